//! Streams and terminals.

use bulkhead_protocol::rpc::Code;
use bulkhead_protocol::task;
use serde_json::json;
use tokio::io::AsyncWriteExt;

use crate::agent;
use crate::fixture::{Agent, process, read_all, read_until, write};

#[tokio::test]
async fn large_output_is_complete_before_its_end() {
    let agent = agent!();
    let output = agent
        .run(
            "c1",
            &[
                "sh",
                "-c",
                "dd if=/dev/zero bs=64k count=320 2>/dev/null; echo end >&2",
            ],
        )
        .await;
    assert_eq!(output.stdout.len(), 20 << 20);
    assert_eq!((output.stderr.as_str(), output.status), ("end\n", 0));
}

#[tokio::test]
async fn input_reaches_the_process_and_ends() {
    let agent = agent!();
    let (request, spec) = agent.request("c1", &["cat"]);
    let (mut stdin, in_name) = agent.stream().await;
    let (stdout, out_name) = agent.stream().await;
    let request = task::CreateTaskRequest {
        stdin: in_name,
        stdout: out_name,
        ..request
    };
    // Before the process exists.
    write(&mut stdin, "early ").await;
    agent.create(request, &spec, "").await.unwrap();
    agent.start_task("c1").await;
    let text = "0123456789".repeat(300_000);
    let sent = text.clone();
    let sender = tokio::spawn(async move {
        write(&mut stdin, &sent).await;
        stdin.shutdown().await.unwrap();
        stdin
    });
    assert_eq!(read_all(stdout).await, format!("early {text}"));
    assert_eq!(agent.wait("c1", "").await, 0);
    drop(sender.await.unwrap());

    // CloseIO ends it too, after what had arrived; without it cat would wait for ever.
    let (mut stdin, in_name) = agent.stream().await;
    let (mut stdout, out_name) = agent.stream().await;
    agent.launch("c2", &["sleep", "1000"]).await;
    agent
        .announce(
            "c2",
            "e",
            &process(&["cat"]),
            false,
            [&in_name, &out_name, ""],
        )
        .await
        .unwrap();
    agent.start_exec("c2", "e").await.unwrap();
    write(&mut stdin, "abc").await;
    assert_eq!(read_until(&mut stdout, "abc").await, "abc");
    let close = task::CloseIoRequest {
        id: "c2".into(),
        exec_id: "e".into(),
        stdin: true,
    };
    agent.tasks.close_io(&close).await.unwrap();
    assert_eq!(read_all(stdout).await, "");
    assert_eq!(agent.wait("c2", "e").await, 0);
}

#[tokio::test]
async fn nobody_reading_stops_one_container_only() {
    let agent = agent!();
    let (request, spec) = agent.request("c1", &["sh", "-c", "yes"]);
    let (stdout, name) = agent.stream().await;
    let request = task::CreateTaskRequest {
        stdout: name,
        ..request
    };
    agent.create(request, &spec, "").await.unwrap();
    agent.start_task("c1").await;
    // Another one works meanwhile.
    let output = agent
        .run("c2", &["sh", "-c", "yes x | head -n 500000 | wc -l"])
        .await;
    assert_eq!(output.stdout, "500000\n");
    // The host drops the stream: the container's output is discarded and it goes on.
    drop(stdout);
    let output = agent.exec("c1", &process(&["echo", "alive"])).await;
    assert_eq!(output.stdout, "alive\n");
    agent.destroy("c1").await;
}

#[tokio::test]
async fn a_process_left_behind_holds_no_stream() {
    let agent = agent!();
    agent.launch("c1", &["sleep", "1000"]).await;
    let output = agent
        .exec("c1", &process(&["sh", "-c", "sleep 1000 & echo started"]))
        .await;
    assert_eq!(output.stdout, "started\n");
    let pids = agent
        .tasks
        .pids(&task::PidsRequest { id: "c1".into() })
        .await
        .unwrap();
    assert_eq!(pids.processes.len(), 2);
    agent.destroy("c1").await;
}

async fn terminal(agent: &Agent, id: &str, args: &[&str]) -> tokio::net::UnixStream {
    let (request, mut spec) = agent.request(id, args);
    spec["process"]["consoleSize"] = json!({"width": 91, "height": 33});
    let (connection, name) = agent.stream().await;
    // One stream per direction, as the contract has it; here input only by a second one.
    let request = task::CreateTaskRequest {
        terminal: true,
        stdout: name,
        ..request
    };
    agent.create(request, &spec, "").await.unwrap();
    agent.start_task(id).await;
    connection
}

#[tokio::test]
async fn a_terminal_of_the_first_process() {
    let agent = agent!();
    let (request, mut spec) = agent.request(
        "c1",
        &["sh", "-c", "tty; stty size; echo ready; while test \"$(stty size)\" != \"50 120\"; do sleep 0.02; done; echo resized; while read line; do echo got $line; done; echo bye; exit 4"],
    );
    spec["process"]["consoleSize"] = json!({"width": 91, "height": 33});
    let (mut stdin, in_name) = agent.stream().await;
    let (mut stdout, out_name) = agent.stream().await;
    let request = task::CreateTaskRequest {
        terminal: true,
        stdin: in_name,
        stdout: out_name,
        ..request
    };
    agent.create(request, &spec, "").await.unwrap();
    agent.start_task("c1").await;
    let text = read_until(&mut stdout, "ready").await;
    assert!(text.contains("33 91"), "{text:?}");
    assert!(
        text.contains("/dev/pts/0") || text.contains("/dev/console"),
        "{text:?}"
    );

    let resize = task::ResizePtyRequest {
        id: "c1".into(),
        exec_id: String::new(),
        width: 120,
        height: 50,
    };
    agent.tasks.resize_pty(&resize).await.unwrap();
    read_until(&mut stdout, "resized").await;
    write(&mut stdin, "one\n").await;
    read_until(&mut stdout, "got one").await;
    // The end of the input stream is the terminal's end-of-file character.
    stdin.shutdown().await.unwrap();
    assert!(read_all(stdout).await.contains("bye"));
    assert_eq!(agent.wait("c1", "").await, 4);
    agent.delete("c1", "").await;
}

#[tokio::test]
async fn a_terminal_of_a_joining_process() {
    let agent = agent!();
    agent.launch("c1", &["sleep", "1000"]).await;
    let (mut stdin, in_name) = agent.stream().await;
    let (mut stdout, out_name) = agent.stream().await;
    agent
        .announce(
            "c1",
            "e",
            &process(&["sh"]),
            true,
            [&in_name, &out_name, ""],
        )
        .await
        .unwrap();
    let resize = task::ResizePtyRequest {
        id: "c1".into(),
        exec_id: "e".into(),
        width: 80,
        height: 24,
    };
    // Before its start.
    agent.tasks.resize_pty(&resize).await.unwrap();
    agent.start_exec("c1", "e").await.unwrap();
    write(&mut stdin, "tty; stty size; echo $((40+2))\n").await;
    let text = read_until(&mut stdout, "42").await;
    assert!(text.contains("/dev/pts/0"), "{text:?}");
    assert!(text.contains("24 80"), "{text:?}");
    // Ctrl-C reaches the foreground process, not the shell.
    write(&mut stdin, "sleep 1000; echo after=$?\n").await;
    read_until(&mut stdout, "after=$?").await;
    let pids = task::PidsRequest { id: "c1".into() };
    let count = async || agent.tasks.pids(&pids).await.unwrap().processes.len();
    while count().await < 3 {
        tokio::task::yield_now().await;
    }
    // Again and again: the first may come before the shell has put it into the foreground.
    while count().await == 3 {
        write(&mut stdin, "\u{3}").await;
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    write(&mut stdin, "exit 6\n").await;
    read_all(stdout).await;
    assert_eq!(agent.wait("c1", "e").await, 6);
    let no_terminal = task::ResizePtyRequest {
        id: "c1".into(),
        width: 1,
        height: 1,
        ..Default::default()
    };
    let error = agent.tasks.resize_pty(&no_terminal).await.unwrap_err();
    assert_eq!(error.code(), Some(Code::FailedPrecondition));
}

#[tokio::test]
async fn a_terminal_nobody_reads_does_not_stop_its_process() {
    let agent = agent!();
    let stdout = terminal(
        &agent,
        "c1",
        &[
            "sh",
            "-c",
            "dd if=/dev/zero bs=1k count=1000 2>/dev/null; exit 2",
        ],
    )
    .await;
    drop(stdout);
    assert_eq!(agent.wait("c1", "").await, 2);
}
