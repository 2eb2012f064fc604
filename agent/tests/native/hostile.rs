//! What a container or a wrong request may try.

use bulkhead_protocol::rpc::Code;
use bulkhead_protocol::types::Mount;
use bulkhead_protocol::{sandbox, task};
use serde_json::json;

use crate::agent;
use crate::fixture::{SHARE, exists, process};

#[tokio::test]
async fn symlinks_of_a_volume_do_not_lead_out_of_the_share() {
    let agent = agent!();
    std::fs::create_dir_all(agent.share("volumes/0")).unwrap();
    for (name, target) in [
        ("abs", "/etc"),
        ("up", "../../../../../../etc"),
        ("magic", "/proc/self/root/etc"),
    ] {
        std::os::unix::fs::symlink(target, agent.share("volumes/0").join(name)).unwrap();
        let (request, mut spec) = agent.request("c1", &["ls", "/vol"]);
        spec["mounts"].as_array_mut().unwrap().push(json!({
            "destination": "/vol", "type": "bind", "source": format!("{SHARE}/volumes/0/{name}"), "options": ["rbind"],
        }));
        let error = agent.create(request, &spec, "").await.unwrap_err();
        assert!(error.to_string().contains(name), "{error}");
        assert_eq!(agent.leftovers(), Vec::<String>::new());
    }
    // Nor of a root.
    std::os::unix::fs::symlink("/", agent.share("rootfs/evil")).unwrap();
    let (mut request, spec) = agent.request("c1", &["true"]);
    request.rootfs[0].source = format!("{SHARE}/rootfs/evil");
    assert!(agent.create(request, &spec, "").await.is_err());
}

#[tokio::test]
async fn a_container_cannot_lie_about_users_or_terminals() {
    let agent = agent!();
    agent.launch("c1", &["sleep", "1000"]).await;
    // /etc/passwd becomes a FIFO: looking a user up must not hang.
    let swap = "rm /etc/passwd; busybox mkfifo /etc/passwd";
    let output = agent.exec("c1", &process(&["sh", "-c", swap])).await;
    assert_eq!(output.status, 0, "{output:?}");
    let mut named = process(&["true"]);
    named["user"] = json!({"username": "www"});
    agent
        .announce("c1", "e1", &named, false, ["", "", ""])
        .await
        .unwrap();
    let error = agent.start_exec("c1", "e1").await.unwrap_err();
    assert!(error.to_string().contains("not a regular file"), "{error}");
    // By number, without asking the file for more than a home directory.
    let output = agent
        .exec("c1", &process(&["sh", "-c", "echo $HOME"]))
        .await;
    assert_eq!(output.stdout, "/root\n");
}

#[tokio::test]
async fn devices_are_out_of_reach_even_with_mknod() {
    let agent = agent!();
    let script = "busybox mknod /tmp/disk b 254 0; busybox mknod /tmp/kmsg c 1 11
        busybox mknod /tmp/null c 1 3
        cat /tmp/disk 2>&1; cat /tmp/kmsg 2>&1; echo fine > /tmp/null && echo null-works";
    let (request, mut spec) = agent.request("c1", &["sh", "-c", script]);
    let caps = json!(["CAP_MKNOD", "CAP_DAC_OVERRIDE"]);
    spec["process"]["capabilities"] =
        json!({"bounding": caps, "effective": caps, "permitted": caps});
    // A volume may forbid devices altogether; a tmpfs of the container does not.
    spec["mounts"].as_array_mut().unwrap().push(
        json!({"destination": "/tmp", "type": "tmpfs", "source": "tmpfs", "options": ["mode=1777"]}),
    );
    let output = agent.run_spec(request, &spec, "").await;
    if !agent.has("cgroup2").await {
        crate::fixture::skipped("no cgroup v2 here: device rules");
        return;
    }
    assert!(output.stdout.contains("null-works"), "{output:?}");
    assert_eq!(
        output.stdout.matches("Operation not permitted").count(),
        2,
        "{output:?}"
    );
}

#[tokio::test]
async fn wrong_requests_are_answered_by_name_and_leave_nothing() {
    let agent = agent!();
    let before = agent.descriptors();
    let (request, spec) = agent.request("c1", &["true"]);
    let attempt = async |request: task::CreateTaskRequest, spec: &serde_json::Value| {
        agent.create(request, spec, "").await.unwrap_err()
    };
    for id in ["", "..", "a/b", &"x".repeat(129)] {
        let request = task::CreateTaskRequest {
            id: id.into(),
            ..request.clone()
        };
        assert_eq!(
            attempt(request, &spec).await.code(),
            Some(Code::InvalidArgument)
        );
    }
    let mount = |kind: &str, source: &str, target: &str| Mount {
        r#type: kind.into(),
        source: source.into(),
        target: target.into(),
        options: vec![],
    };
    for (rootfs, word) in [
        (
            mount("bulkhead-share", "/etc", ""),
            "below no mounted share",
        ),
        (
            mount("bulkhead-share", &format!("{SHARE}/../x"), ""),
            "without . and ..",
        ),
        (
            mount("bulkhead-share", &format!("{SHARE}/rootfs/none"), ""),
            "rootfs/none",
        ),
        (mount("virtiofs", "no-such-tag", ""), "no-such-tag"),
        (mount("nfs", "host:/x", ""), "nfs"),
    ] {
        let request = task::CreateTaskRequest {
            rootfs: vec![rootfs],
            ..request.clone()
        };
        let error = attempt(request, &spec).await;
        assert!(error.to_string().contains(word), "{error}");
    }
    let unknown_stream = task::CreateTaskRequest {
        stdout: "stream:never-opened".into(),
        ..request.clone()
    };
    let error = attempt(unknown_stream, &spec).await;
    assert_eq!(error.code(), Some(Code::FailedPrecondition));
    assert!(error.to_string().contains("never-opened"));
    let fifo = task::CreateTaskRequest {
        stdout: "/run/fifo".into(),
        ..request.clone()
    };
    assert_eq!(
        attempt(fifo, &spec).await.code(),
        Some(Code::InvalidArgument)
    );

    let mut hooked = spec.clone();
    hooked["hooks"] = json!({"poststop": [{"path": "/bin/evil"}]});
    let error = attempt(request.clone(), &hooked).await;
    assert_eq!(error.code(), Some(Code::Unimplemented));
    assert!(error.to_string().contains("hooks.poststop"));
    let mut old = spec.clone();
    old["ociVersion"] = json!("0.1");
    let error = attempt(request.clone(), &old).await;
    assert!(!error.to_string().is_empty());
    let mut caps = spec.clone();
    caps["process"]["capabilities"]["bounding"] = json!(["CAP_NONSENSE"]);
    assert!(
        attempt(request.clone(), &caps)
            .await
            .to_string()
            .contains("c1")
    );

    let find = agent
        .tasks
        .start(&task::StartRequest {
            id: "none".into(),
            ..Default::default()
        })
        .await
        .unwrap_err();
    assert_eq!(find.code(), Some(Code::NotFound));
    let sysctl = sandbox::ConfigureSandboxRequest {
        sysctls: [("../../etc/x".to_owned(), "1".to_owned())].into(),
        ..Default::default()
    };
    let error = agent.sandbox.configure_sandbox(&sysctl).await.unwrap_err();
    assert_eq!(error.code(), Some(Code::InvalidArgument));
    let entropy = sandbox::AddEntropyRequest { data: vec![0; 513] };
    assert!(agent.sandbox.add_entropy(&entropy).await.is_err());

    assert_eq!(agent.leftovers(), Vec::<String>::new());
    assert_eq!(agent.descriptors(), before);
    assert!(!exists(&agent.share("rootfs/none")));
    // And it still works.
    assert_eq!(agent.run("c1", &["true"]).await.status, 0);
}

#[tokio::test]
async fn streams_are_refused_or_dropped_in_order() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let agent = agent!();
    // The same id twice.
    let (_held, name) = agent.stream().await;
    let id = name.strip_prefix("stream:").unwrap().to_owned();
    let mut second = agent.raw_stream().await;
    let error = bulkhead_protocol::stream::connect(&mut second, &id)
        .await
        .unwrap_err();
    assert!(error.to_string().contains("waiting already"), "{error}");
    // A header without end.
    let mut endless = agent.raw_stream().await;
    endless.write_all(&[b'x'; 200]).await.unwrap();
    let mut answer = String::new();
    let _ = endless.read_to_string(&mut answer).await;
    assert!(
        answer.is_empty() || answer.starts_with("error "),
        "{answer:?}"
    );
}
