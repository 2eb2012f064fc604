//! Both sides of the socket against each other, and hostile clients.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::{Value, json};

use super::*;
use crate::engine::{EngineError, Sandbox};

/// Answers everything; echoes on the streams.
#[derive(Debug, Default)]
struct Fake {
    calls: Mutex<Vec<String>>,
}

impl Fake {
    fn note(&self, call: impl Into<String>) {
        self.calls.lock().expect("lock").push(call.into());
    }

    fn echo() -> UnixStream {
        let (ours, theirs) = UnixStream::pair().expect("pair");
        std::thread::spawn(move || {
            let (mut from, mut to) = (&ours, &ours);
            let _ = std::io::copy(&mut from, &mut to);
        });
        theirs
    }
}

impl Sandbox for Fake {
    fn id(&self) -> String {
        "a41f".into()
    }
    fn inspect(&self) -> Result<Value, EngineError> {
        Ok(json!({"state": "running", "filler": "x".repeat(100_000)}))
    }
    fn stats(&self) -> Result<Value, EngineError> {
        Ok(json!({"exits": 7}))
    }
    fn registers(&self) -> Result<Value, EngineError> {
        Ok(json!([]))
    }
    fn pause(&self) -> Result<(), EngineError> {
        self.note("pause");
        Ok(())
    }
    fn resume(&self) -> Result<(), EngineError> {
        Err(EngineError::Volume {
            path: "/x".into(),
            reason: "a reason".into(),
        })
    }
    fn dump(&self, path: &Path) -> Result<(), EngineError> {
        self.note(path.display().to_string());
        Ok(())
    }
    fn stop(&self, grace: Duration) -> Result<(), EngineError> {
        self.note(format!("stop {grace:?}"));
        Ok(())
    }
    fn connect(&self, port: u32, _timeout: Duration) -> Result<UnixStream, EngineError> {
        self.note(format!("connect {port}"));
        Ok(Self::echo())
    }
    fn console(&self) -> Result<UnixStream, EngineError> {
        Ok(Self::echo())
    }
}

struct Served {
    dir: tempfile::TempDir,
    fake: Arc<Fake>,
}

impl Served {
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("tempdir");
        let listener = bind(&dir.path().join("debug.sock")).expect("bound");
        listener.set_nonblocking(false).expect("blocking");
        let fake = Arc::new(Fake::default());
        let sandbox = Arc::clone(&fake);
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                serve_connection(stream, sandbox.clone());
            }
        });
        Self { dir, fake }
    }

    fn remote(&self) -> Remote {
        Remote::new("a41f", self.dir.path())
    }

    fn raw(&self) -> UnixStream {
        UnixStream::connect(self.dir.path().join("debug.sock")).expect("connected")
    }
}

#[test]
fn every_operation_reaches_the_owner() {
    let served = Served::new();
    let remote = served.remote();
    assert_eq!(remote.inspect().expect("inspect")["state"], "running");
    assert_eq!(remote.stats().expect("stats")["exits"], 7);
    remote.pause().expect("paused");
    remote.dump(Path::new("/tmp/core")).expect("dumped");
    remote.stop(Duration::from_secs(3)).expect("stopped");
    let error = remote.resume().expect_err("refused");
    assert_eq!(
        (error.kind(), error.to_string().as_str()),
        ("volume", "volume /x: a reason")
    );
    let calls = served.fake.calls.lock().expect("lock").clone();
    assert_eq!(calls, ["pause", "/tmp/core", "stop 3s"]);
}

#[test]
fn streams_come_through() {
    let served = Served::new();
    let mut guest = served
        .remote()
        .connect(1024, Duration::from_secs(5))
        .expect("connected");
    let mut console = served.remote().console().expect("console");
    for stream in [&mut guest, &mut console] {
        stream.write_all(b"hello").expect("written");
        let mut text = [0u8; 5];
        stream.read_exact(&mut text).expect("echoed");
        assert_eq!(&text, b"hello");
    }
}

#[test]
fn bad_requests_are_answered_and_endless_ones_cut() {
    let served = Served::new();
    let mut stream = served.raw();
    stream
        .write_all(b"{\"op\":\"nope\"}\nnot json\n{\"op\":\"hello\"}\n")
        .expect("written");
    let mut text = String::new();
    let mut buffer = [0u8; 4096];
    while text.lines().count() < 3 || !text.ends_with('\n') {
        let n = stream.read(&mut buffer).expect("answer");
        text.push_str(&String::from_utf8_lossy(&buffer[..n]));
    }
    let lines: Vec<Value> = text
        .lines()
        .map(|l| serde_json::from_str(l).expect("json"))
        .collect();
    assert_eq!(lines[0]["error"]["kind"], "bad_request");
    assert_eq!(lines[1]["ok"], false);
    assert_eq!(lines[2]["result"]["id"], "a41f");

    let mut endless = served.raw();
    // The server may hang up while we still write.
    let _ = endless.write_all(&vec![b'x'; MAX_REQUEST * 2]);
    let mut answer = Vec::new();
    let _ = endless.read_to_end(&mut answer);
}

#[test]
fn a_dead_owner_is_named() {
    let dir = tempfile::tempdir().expect("tempdir");
    let error = Remote::new("a41f", dir.path())
        .stats()
        .expect_err("nobody there");
    assert!(error.to_string().contains("VM a41f"), "{error}");
}
