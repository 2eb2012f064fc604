//! `vmmctl` on the VMs of a running daemon.

use std::process::{Command, Output};

use anyhow::{Context, Result, ensure};
use bulkhead_tests::cri::containerd::{APP, Node, OURS};
use bulkhead_tests::cri::{TestPod, container, pod};
use bulkhead_tests::env;
use serde_json::Value;

use super::Test;

pub const TESTS: &[Test] = &[("vmmctl_sees_pods", false, sees_pods)];

fn vmmctl(args: &[&str]) -> Result<Output> {
    Command::new(env::vmmctl()?)
        .args(args)
        .output()
        .context("vmmctl")
}

/// What it prints when it succeeds.
fn said(args: &[&str]) -> Result<String> {
    let output = vmmctl(args)?;
    let text = |b: &[u8]| String::from_utf8_lossy(b).into_owned();
    ensure!(
        output.status.success(),
        "vmmctl {args:?}: {:?}: {}",
        output.status.code(),
        text(&output.stderr)
    );
    Ok(text(&output.stdout))
}

/// ps, inspect, exec, stats and stop find a pod by the ids that crictl prints, whole and shortened,
/// and by the one of its VM.
fn sees_pods(node: &mut Node, _: &str) -> Result<()> {
    for (handler, kind) in [(OURS, "microvm"), (APP, "app")] {
        let pod = TestPod::run(node, handler, pod("seen"))?;
        let web = pod.sleeper("web")?;
        let listed: Vec<Value> = serde_json::from_str(&said(&["ps", "--json"])?)?;
        ensure!(listed.len() == 1, "{listed:?}");
        let shown = &listed[0];
        ensure!(
            shown["kind"] == kind
                && shown["mode"] == "pod"
                && shown["image"] == "default/seen"
                && shown["pod"] == pod.id.as_str(),
            "{shown}"
        );
        let vm = shown["id"].as_str().context("no id")?.to_owned();
        for id in [pod.id.as_str(), &pod.id[..13], &pod.id[..7], &vm] {
            let found: Value = serde_json::from_str(&said(&["inspect", id])?)?;
            ensure!(
                found["state"]["id"] == vm.as_str() && found["vm"]["state"] == "running",
                "{id}: {found}"
            );
        }
        // The only container needs no name.
        let name = said(&["exec", &pod.id, "hostname"])?;
        ensure!(name == "seen\n", "{name:?}");
        let log = pod.start(&container("log", "busybox", &["sleep", "100000"]))?;
        let which = vmmctl(&["exec", &pod.id, "true"])?;
        let words = String::from_utf8_lossy(&which.stderr).into_owned();
        ensure!(
            !which.status.success() && words.contains("--container") && words.contains("web ("),
            "{which:?}"
        );
        pod.sh(&log, "echo here > /tmp/mark")?;
        for name in ["log", &log, &log[..13]] {
            let mark = said(&["exec", "--container", name, &pod.id, "cat", "/tmp/mark"])?;
            ensure!(mark == "here\n", "{name}: {mark:?}");
        }
        let code = vmmctl(&["exec", "-c", &web, &pod.id, "sh", "-c", "exit 5"])?;
        ensure!(code.status.code() == Some(5), "{code:?}");
        said(&["stats", &pod.id])?;
        // Stopped by it, the pod has ended for containerd as well.
        said(&["stop", "-t", "1", &pod.id])?;
        let begin = std::time::Instant::now();
        while pod.cri.pod_status(&pod.id)?.state == bulkhead_tests::cri::proto::SANDBOX_READY {
            ensure!(begin.elapsed() < env::PATIENCE, "the pod is still ready");
            std::thread::sleep(std::time::Duration::from_millis(50));
        }
        let gone = vmmctl(&["inspect", &pod.id])?;
        ensure!(!gone.status.success(), "{gone:?}");
        pod.remove()?;
    }
    Ok(())
}
