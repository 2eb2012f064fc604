//! Programs in pods, asked for by Kubernetes' interface: stock containerd with our daemon as its
//! sandbox plugin.

use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};

use super::Row;
use crate::cri::containerd::{APP, IoType, Node, OURS, PROCESS};
use crate::cri::proto::SANDBOX_READY;
use crate::cri::{TestPod, WebSocket, container, log, pod};
use crate::env::{PATIENCE, built};

/// Port of the pod's server, on its loopback only.
const PORT: i32 = 8080;

/// Runs them all; starts the daemons and ends them. Needs a host that may be changed: the lab.
///
/// # Errors
/// An image or program is missing, or a daemon does not start.
pub fn rows() -> Result<Vec<Row>> {
    let node = Node::start(&built("sandboxer")?, &["busybox", "python3"], IoType::Fifo)?;
    let mut rows = Vec::new();
    let own = std::fs::read_to_string("/proc/sys/kernel/osrelease").context("uname")?;
    for (handler, kernel) in [
        (OURS, "-bulkhead "),
        (APP, "-bulkhead-app "),
        (PROCESS, own.trim()),
    ] {
        for (image, command, expected, holds) in [
            ("busybox", "uname -a", 0, kernel),
            ("python3", "python3 /app/job.py", 0, "job ok: 4 threads"),
            (
                "busybox",
                "echo leaving with 7; exit 7",
                7,
                "leaving with 7",
            ),
        ] {
            eprintln!("running {image} {command} in a pod of {handler}");
            let begin = Instant::now();
            let said = batch(&node, handler, image, command);
            rows.push(finish(
                handler, image, command, begin, said, expected, holds,
            ));
        }
        eprintln!("running a pod of two containers of {handler}");
        rows.extend(two_containers(&node, handler)?);
    }
    Ok(rows)
}

/// What a program has said: milliseconds until it could start, its exit code and output.
type Said = (f64, i32, String);

fn finish(
    handler: &str,
    image: &str,
    command: &str,
    begin: Instant,
    said: Result<Said>,
    expected: i32,
    holds: &str,
) -> Row {
    let (boot_ms, exit_code, stdout, failure) = match said {
        Err(error) => (0.0, -1, String::new(), Some(format!("{error:#}"))),
        Ok((boot, code, out)) => {
            let out = out.trim_end().to_owned();
            let failure = if code != expected {
                Some(format!("exit code {code}, not {expected}: {out}"))
            } else if !out.contains(holds) {
                Some(format!("the output lacks {holds:?}: {out}"))
            } else {
                None
            };
            (boot, code, out, failure)
        }
    };
    Row {
        sandbox: match handler {
            APP => "appkernel",
            PROCESS => "process",
            _ => "microvm",
        }
        .into(),
        via: "cri".into(),
        image: image.into(),
        command: command.into(),
        exit_code,
        stdout,
        boot_ms,
        total_ms: ms(begin),
        failure,
    }
}

fn ms(begin: Instant) -> f64 {
    begin.elapsed().as_secs_f64() * 1e3
}

/// A pod of one container that ends by itself; removed.
fn batch(node: &Node, handler: &str, image: &str, command: &str) -> Result<Said> {
    let begin = Instant::now();
    let pod = TestPod::run(node, handler, pod("demo-job"))?;
    let spec = container("job", image, &["sh", "-c", command]);
    let id = pod.start(&spec)?;
    let boot = ms(begin);
    let status = pod.cri.wait_exit(&id, PATIENCE)?;
    let (out, _) = log(&pod.config, &spec)?;
    let logs = pod.config.log_directory.clone();
    pod.remove()?;
    std::fs::remove_dir_all(&logs).context(logs)?;
    Ok((boot, status.exit_code, out))
}

/// A server and its neighbour in one pod, which share only the network, and what one does with
/// them from outside.
fn two_containers(node: &Node, handler: &str) -> Result<Vec<Row>> {
    let begin = Instant::now();
    let pod = TestPod::run(node, handler, pod("demo-pair"))?;
    let script = format!(
        "mkdir /www && echo hello from the pod > /www/index.html && echo serving && \
         exec httpd -f -p 127.0.0.1:{PORT} -h /www"
    );
    let spec = container("server", "busybox", &["sh", "-c", &script]);
    let server = pod.start(&spec)?;
    let neighbour = pod.sleeper("neighbour")?;
    let mut boot = ms(begin);
    pod.until(
        &neighbour,
        &format!("wget -qO- http://127.0.0.1:{PORT}/ 2>/dev/null || true"),
        "hello",
    )?;
    let mut rows = Vec::new();
    let mut row = |command: &str, begin: Instant, said: Result<String>, holds: &str| {
        // The pod started once.
        let started = std::mem::take(&mut boot);
        let said = said.map(|out| (started, 0, out));
        rows.push(finish(handler, "busybox", command, begin, said, 0, holds));
    };
    let command = format!("wget -qO- http://127.0.0.1:{PORT}/");
    let said = pod.sh(&neighbour, &command);
    row(
        &format!("neighbour: {command}"),
        begin,
        said,
        "hello from the pod",
    );
    let now = Instant::now();
    let said = pod.sh(&server, "echo exec as $(id -un) in $(hostname)");
    row("exec: echo ... $(hostname)", now, said, "in demo-pair");
    let now = Instant::now();
    let said = log(&pod.config, &spec).map(|(out, _)| out);
    row("logs", now, said, "serving");
    let now = Instant::now();
    row("port-forward", now, forwarded(&pod), "hello from the pod");
    let now = Instant::now();
    row("stats", now, stats(&pod, &server), " MiB");
    let now = Instant::now();
    let (cri, id) = (node.cri(handler)?, pod.id.clone());
    ensure!(
        cri.pod_status(&id)?.state == SANDBOX_READY,
        "the pod is not ready"
    );
    let said = pod.remove().and_then(|()| match cri.pods()?.len() {
        0 => Ok("no pod left".to_owned()),
        n => bail!("{n} pods are left"),
    });
    row("remove", now, said, "no pod left");
    Ok(rows)
}

/// Asks the server, which listens on the pod's loopback, from outside.
fn forwarded(pod: &TestPod) -> Result<String> {
    let url = pod.cri.port_forward_url(&pod.id, PORT)?;
    let mut socket = WebSocket::connect(&url, "v4.channel.k8s.io")?;
    socket.send(0, b"GET / HTTP/1.0\r\n\r\n")?;
    let mut all = Vec::new();
    while let Some((channel, data)) = socket.receive()? {
        // The first message of each channel is the port's number.
        if data.len() > 2 {
            ensure!(channel == 0, "{}", String::from_utf8_lossy(&data));
            all.extend(data);
        }
        if all.ends_with(b"pod\n") {
            break;
        }
    }
    let text = String::from_utf8_lossy(&all);
    Ok(text.lines().last().unwrap_or_default().to_owned())
}

fn stats(pod: &TestPod, container: &str) -> Result<String> {
    let stats = pod.cri.stats(container)?;
    let cpu = stats
        .cpu
        .and_then(|c| c.usage_core_nano_seconds)
        .map_or(0, |v| v.value);
    let memory = stats
        .memory
        .and_then(|m| m.working_set_bytes)
        .map_or(0, |v| v.value);
    ensure!(cpu > 0 && memory > 0, "CPU {cpu} ns, memory {memory} bytes");
    let both = pod.cri.pod_stats(&pod.id)?.linux.context("no pod stats")?;
    #[expect(clippy::cast_precision_loss, reason = "shown to a person")]
    let shown = (cpu as f64 / 1e6, memory as f64 / f64::from(1 << 20));
    Ok(format!(
        "server: {:.0} ms CPU, {:.1} MiB; {} containers",
        shown.0,
        shown.1,
        both.containers.len()
    ))
}
