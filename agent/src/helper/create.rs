//! Making a container, by libcontainer.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;

use bulkhead_protocol::rpc::Code;
use libcontainer::container::builder::ContainerBuilder;
use libcontainer::syscall::syscall::SyscallType;
use serde::{Deserialize, Serialize};

use super::{Failure, payload, receive_master};

/// Where libcontainer keeps its state.
pub const STATE_DIR: &str = "/run/bulkhead/libcontainer";

/// The job.
#[derive(Debug, Serialize, Deserialize)]
pub struct Create {
    /// The container's id.
    pub id: String,
    /// Directory with config.json.
    pub bundle: PathBuf,
    /// Whether the process has a terminal.
    pub terminal: bool,
}

/// Does it. Gives the pid of the container's first process, which waits to be started, and the
/// master of its terminal.
pub fn run(job: &Create) -> Result<(i32, Option<OwnedFd>), Failure> {
    let io = |what: &'static str| {
        move |error: std::io::Error| Failure::internal(format!("{what}: {error}"))
    };
    std::fs::create_dir_all(STATE_DIR).map_err(io("make the state directory"))?;
    // Relative, because a socket's path is limited to 107 bytes and ids are long.
    std::env::set_current_dir(&job.bundle).map_err(io("enter the bundle"))?;
    let console = if job.terminal {
        Some(UnixListener::bind("console.sock").map_err(io("make the console socket"))?)
    } else {
        None
    };
    let error = |error: libcontainer::error::LibcontainerError| {
        let message = chain(&error);
        Failure {
            code: match error {
                libcontainer::error::LibcontainerError::InvalidSpec(_)
                | libcontainer::error::LibcontainerError::InvalidInput(_)
                | libcontainer::error::LibcontainerError::InvalidID(_)
                | libcontainer::error::LibcontainerError::Spec(_) => Code::InvalidArgument,
                _ => payload::code_of(&message),
            },
            message: format!("container {}: {message}", job.id),
        }
    };
    let container = ContainerBuilder::new(job.id.clone(), SyscallType::default())
        .with_executor(payload::Payload)
        .with_root_path(STATE_DIR)
        .map_err(error)?
        .with_console_socket(console.as_ref().map(|_| job.bundle.join("console.sock")))
        .validate_id()
        .map_err(error)?
        .as_init(&job.bundle)
        .with_systemd(false)
        .with_detach(true)
        .build()
        .map_err(error)?;
    let pid = container
        .pid()
        .ok_or_else(|| Failure::internal(format!("container {}: has no process", job.id)))?
        .as_raw();
    let master = match console {
        None => None,
        Some(listener) => {
            let (socket, _) = listener
                .accept()
                .map_err(io("accept the console's connection"))?;
            Some(receive_master(&socket).map_err(io("receive the terminal"))?)
        }
    };
    Ok((pid, master))
}

/// An error with all its causes, without repeating what one says of the next.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        next = cause.source();
    }
    text
}
