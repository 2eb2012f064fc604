//! One process in a guest, container or exec, with its standard streams: create, start, signal,
//! resize, wait.

use std::sync::Arc;
use std::time::Duration;

use bulkhead_protocol::sandbox::{
    CONTAINER_OPTIONS_TYPE_URL, ContainerOptions, OCI_PROCESS_TYPE_URL,
};
use bulkhead_protocol::stream::uri;
use bulkhead_protocol::task::{
    CreateTaskRequest, DeleteRequest, ExecProcessRequest, KillRequest, ResizePtyRequest,
    StartRequest, WaitRequest,
};
use bulkhead_protocol::types::{Any, Mount};
use prost::Message;
use tokio::net::UnixStream;
use tokio::sync::Notify;
use tokio::task::JoinHandle;

use super::EngineError;
use super::agent::{Agent, failed, program_error};
use super::stdio::{Standard, drain, feed, split};
use crate::spec::Spec;
use crate::timeouts;

const SIGKILL: u32 = 9;
const SIGPIPE: u32 = 13;
/// What a program gets to end after its output has lost its reader.
const PIPE_GRACE: Duration = Duration::from_secs(1);

/// Which standard streams the process gets.
#[derive(Debug, Clone, Copy)]
pub struct Wiring {
    /// Ours is passed on.
    pub stdin: bool,
    /// It has a terminal: one stream for output and errors.
    pub terminal: bool,
}

/// A process in a guest. An empty exec id means the container's first.
#[derive(Debug)]
pub struct Process {
    agent: Agent,
    container: String,
    exec: String,
    command: String,
    input: Option<JoinHandle<std::io::Result<()>>>,
    output: Vec<JoinHandle<()>>,
    /// Told when nobody reads our output any more.
    broken: Arc<Notify>,
}

#[derive(Debug)]
struct Streams {
    stdin: Option<UnixStream>,
    stdout: UnixStream,
    stderr: Option<UnixStream>,
}

/// Names of the streams in the Create or Exec call.
struct Names {
    stdin: String,
    stdout: String,
    stderr: String,
}

async fn open_streams(
    agent: &Agent,
    prefix: &str,
    wiring: Wiring,
) -> Result<(Streams, Names), EngineError> {
    let id = |what: &str| format!("{prefix}-{what}");
    let optional = async |wanted: bool, what: &str| match wanted {
        true => agent.stream(&id(what)).await.map(Some),
        false => Ok(None),
    };
    // At once: each costs a few exchanges with the guest.
    let (stdin, stdout, stderr) = tokio::try_join!(
        optional(wiring.stdin, "stdin"),
        async { agent.stream(&id("stdout")).await },
        optional(!wiring.terminal, "stderr"),
    )?;
    let name = |present: bool, what: &str| {
        if present {
            uri(&id(what))
        } else {
            String::new()
        }
    };
    let names = Names {
        stdin: name(wiring.stdin, "stdin"),
        stdout: name(true, "stdout"),
        stderr: name(!wiring.terminal, "stderr"),
    };
    Ok((
        Streams {
            stdin,
            stdout,
            stderr,
        },
        names,
    ))
}

impl Process {
    /// Creates a container from `spec`; its root is at `guest_root`.
    ///
    /// # Errors
    /// The guest refuses.
    pub async fn create(
        agent: Agent,
        container: &str,
        guest_root: &str,
        spec: &Spec,
        wiring: Wiring,
    ) -> Result<Self, EngineError> {
        let command = spec.command().first().cloned().unwrap_or_default();
        let (streams, names) = open_streams(&agent, container, wiring).await?;
        let oci_spec = serde_json::to_vec(&spec.json)
            .map_err(|e| EngineError::io("container spec")(e.into()))?;
        let options = ContainerOptions {
            oci_spec,
            user: spec.user.clone(),
            sandbox_etc: true,
            disks: Vec::new(),
        };
        let request = CreateTaskRequest {
            id: container.to_owned(),
            rootfs: vec![Mount {
                r#type: "bulkhead-share".into(),
                source: guest_root.to_owned(),
                target: String::new(),
                options: vec!["rbind".into()],
            }],
            terminal: wiring.terminal,
            stdin: names.stdin,
            stdout: names.stdout,
            stderr: names.stderr,
            options: Some(Any {
                type_url: CONTAINER_OPTIONS_TYPE_URL.to_owned(),
                value: options.encode_to_vec(),
            }),
            ..CreateTaskRequest::default()
        };
        agent
            .tasks()
            .create(&request)
            .await
            .map_err(|e| program_error(&command, "creating the container", e))?;
        Self::attach(agent, container, "", command, streams)
    }

    /// Adds a process to a running container.
    ///
    /// # Errors
    /// The guest refuses.
    pub async fn exec(
        agent: Agent,
        container: &str,
        exec: &str,
        process: &serde_json::Value,
        wiring: Wiring,
    ) -> Result<Self, EngineError> {
        let command = process["args"][0].as_str().unwrap_or_default().to_owned();
        let (streams, names) = open_streams(&agent, &format!("{container}-{exec}"), wiring).await?;
        let value =
            serde_json::to_vec(process).map_err(|e| EngineError::io("process spec")(e.into()))?;
        let request = ExecProcessRequest {
            id: container.to_owned(),
            exec_id: exec.to_owned(),
            terminal: wiring.terminal,
            stdin: names.stdin,
            stdout: names.stdout,
            stderr: names.stderr,
            spec: Some(Any {
                type_url: OCI_PROCESS_TYPE_URL.to_owned(),
                value,
            }),
        };
        agent
            .tasks()
            .exec(&request)
            .await
            .map_err(|e| program_error(&command, "adding the process", e))?;
        Self::attach(agent, container, exec, command, streams)
    }

    fn attach(
        agent: Agent,
        container: &str,
        exec: &str,
        command: String,
        streams: Streams,
    ) -> Result<Self, EngineError> {
        let standard = EngineError::io("standard streams");
        let mut output = Vec::new();
        let broken = Arc::new(Notify::new());
        let pass_on = |from, to| {
            let broken = Arc::clone(&broken);
            tokio::spawn(async move {
                if drain(from, to).await.is_err() {
                    broken.notify_one();
                }
            })
        };
        let result: std::io::Result<Option<JoinHandle<_>>> = (|| {
            // Dropping the write half would half-close the stream.
            let (from, unused) = split(streams.stdout);
            unused.forget();
            output.push(pass_on(from, Standard::output()?));
            if let Some(stderr) = streams.stderr {
                let (from, unused) = split(stderr);
                unused.forget();
                output.push(pass_on(from, Standard::error()?));
            }
            Ok(streams.stdin.map(|stdin| {
                let (_, to) = split(stdin);
                tokio::spawn(feed(to))
            }))
        })();
        let input = result.map_err(standard)?;
        Ok(Self {
            agent,
            container: container.to_owned(),
            exec: exec.to_owned(),
            command,
            input,
            output,
            broken,
        })
    }

    /// Starts it.
    ///
    /// # Errors
    /// The program cannot be executed, or the guest refuses.
    pub async fn start(&self) -> Result<(), EngineError> {
        let request = StartRequest {
            id: self.container.clone(),
            exec_id: self.exec.clone(),
        };
        let started = self.agent.tasks().start(&request).await;
        started
            .map(|_| ())
            .map_err(|e| program_error(&self.command, "starting the program", e))
    }

    /// Sets the terminal's size.
    ///
    /// # Errors
    /// There is no terminal, or the process has ended.
    pub async fn resize(&self, width: u16, height: u16) -> Result<(), EngineError> {
        let request = ResizePtyRequest {
            id: self.container.clone(),
            exec_id: self.exec.clone(),
            width: width.into(),
            height: height.into(),
        };
        self.agent
            .tasks()
            .resize_pty(&request)
            .await
            .map(|_| ())
            .map_err(failed("resizing the terminal"))
    }

    /// Sends a signal to it.
    ///
    /// # Errors
    /// It has ended.
    pub async fn kill(&self, signal: u32) -> Result<(), EngineError> {
        kill(&self.agent, &self.container, &self.exec, signal).await
    }

    /// Waits for its end: exit code, or 128 + signal. When the reader of our output leaves
    /// (`vmmctl run … | head`), the program gets SIGPIPE as in any pipeline, and is killed if it
    /// does not heed that: a container's first process is deaf to signals it does not handle.
    ///
    /// # Errors
    /// The guest has gone.
    pub async fn wait(&self) -> Result<u32, EngineError> {
        let end = self.end();
        tokio::pin!(end);
        tokio::select! {
            code = &mut end => return code,
            () = self.broken.notified() => {}
        }
        // Fails if it has just ended.
        let _ = self.kill(SIGPIPE).await;
        if let Ok(code) = tokio::time::timeout(PIPE_GRACE, &mut end).await {
            return code;
        }
        let _ = self.kill(SIGKILL).await;
        end.await.map(|_| 128 + SIGPIPE)
    }

    async fn end(&self) -> Result<u32, EngineError> {
        let request = WaitRequest {
            id: self.container.clone(),
            exec_id: self.exec.clone(),
        };
        let answer = self.agent.tasks().wait(&request).await;
        answer
            .map(|a| a.exit_status)
            .map_err(failed("waiting for the program"))
    }

    /// After its end: waits until all of its output has been written, then removes it.
    pub async fn finish(mut self) {
        if let Some(input) = self.input.take() {
            input.abort();
        }
        let all = async {
            for output in &mut self.output {
                let _ = output.await;
            }
        };
        // A process that lives on in the container may hold the stream open for ever.
        let _ = tokio::time::timeout(timeouts::drain(), all).await;
        for output in &self.output {
            output.abort();
        }
        if !self.exec.is_empty() {
            let request = DeleteRequest {
                id: self.container.clone(),
                exec_id: self.exec.clone(),
            };
            let _ = self.agent.tasks().delete(&request).await;
        }
    }
}

/// Sends a signal to a process of a container.
///
/// # Errors
/// It has ended.
pub async fn kill(
    agent: &Agent,
    container: &str,
    exec: &str,
    signal: u32,
) -> Result<(), EngineError> {
    let request = KillRequest {
        id: container.to_owned(),
        exec_id: exec.to_owned(),
        signal,
        all: false,
    };
    agent
        .tasks()
        .kill(&request)
        .await
        .map(|_| ())
        .map_err(failed(format!("sending signal {signal}")))
}
