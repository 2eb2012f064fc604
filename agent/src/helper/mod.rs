//! Processes that make containers and processes in them.
//!
//! libcontainer forks and changes namespaces, working directory and signal state of its caller.
//! The agent must not: so it runs itself again as a single-threaded helper for one job, with the
//! container's stdio as descriptors 0 to 2 and a socket on which the job comes in and the answer
//! goes out. What the helper leaves behind is reparented to the agent.

pub mod create;
pub mod exec;
pub mod pause;
pub mod payload;

use std::io::{IoSlice, IoSliceMut, Read};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream as StdUnixStream;
use std::process::{Command, Stdio};
use std::time::Duration;

use bulkhead_protocol::rpc::Code;
use nix::cmsg_space;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncWriteExt, Interest};
use tokio::net::UnixStream;

use crate::error::{Context, Error, Result};
use crate::reaper::{Exit, Reaper};
use crate::stdio::ChildEnds;

/// First argument of a helper process.
pub const ARGUMENT: &str = "helper";
/// How long a helper may take; emulated guests are slow.
const TIME: Duration = Duration::from_secs(120);
/// Longest answer in bytes.
const MAX_REPLY: usize = 64 << 10;

/// What a helper does.
#[derive(Debug, Serialize, Deserialize)]
pub enum Job {
    /// Makes a container from a bundle.
    Create(create::Create),
    /// Starts a process in a container.
    Exec(Box<exec::Exec>),
    /// Makes a PID namespace.
    PidNamespace,
}

/// What it answers.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Reply {
    /// The new process.
    pid: Option<i32>,
    /// A [`Code`], when it failed.
    code: i32,
    /// Why.
    error: String,
}

/// Why a helper failed, on its own side.
#[derive(Debug)]
pub struct Failure {
    /// The code to answer with.
    pub code: Code,
    /// The message to answer with.
    pub message: String,
}

impl Failure {
    /// A failure of ours or of the kernel.
    pub fn internal(message: impl Into<String>) -> Self {
        Self {
            code: Code::Internal,
            message: message.into(),
        }
    }
}

/// A process that a helper has made.
pub struct Made {
    /// Its id here.
    pub pid: i32,
    /// Gives its end.
    pub end: tokio::sync::oneshot::Receiver<Exit>,
    /// Its terminal's master.
    pub master: Option<OwnedFd>,
    /// Ends when the process executes its program, or ends.
    pub executed: UnixStream,
}

/// Runs `job` with `ends` as its stdio.
pub async fn run(reaper: &Reaper, job: &Job, ends: ChildEnds) -> Result<Made> {
    let starting = reaper.starting();
    let (ours, theirs) = StdUnixStream::pair().context(|| "make a helper's socket".to_owned())?;
    // Inherited by this one child: nothing else is spawned meanwhile, there is one thread.
    fcntl(&theirs, FcntlArg::F_SETFD(FdFlag::empty()))
        .context(|| "hand a socket to a helper".to_owned())?;
    let helper = Command::new("/proc/self/exe")
        .arg(ARGUMENT)
        .arg(theirs.as_raw_fd().to_string())
        .env_clear()
        .current_dir("/")
        .stdin(Stdio::from(ends.stdin))
        .stdout(Stdio::from(ends.stdout))
        .stderr(Stdio::from(ends.stderr))
        .spawn()
        .context(|| "start a helper".to_owned())?;
    drop(theirs);
    let helper_pid = i32::try_from(helper.id()).unwrap_or(0);
    let exchange = exchange(ours, job, reaper.wait(helper_pid));
    let (reply, master, executed) = match tokio::time::timeout(TIME, exchange).await {
        Ok(result) => result?,
        Err(_) => {
            let _ = nix::sys::signal::kill(
                nix::unistd::Pid::from_raw(helper_pid),
                nix::sys::signal::Signal::SIGKILL,
            );
            return Err(Error::Helper {
                code: Code::DeadlineExceeded,
                message: format!("making the process took more than {TIME:?}; gave up"),
            });
        }
    };
    let made = match reply.pid {
        Some(pid) if pid > 1 => Made {
            pid,
            end: reaper.wait(pid),
            master,
            executed,
        },
        _ => {
            return Err(Error::Helper {
                code: Code::try_from(reply.code).unwrap_or(Code::Internal),
                message: reply.error,
            });
        }
    };
    drop(starting);
    Ok(made)
}

/// Sends the job and reads the answer. Not up to the end of the stream: the new process may hold
/// a copy of the helper's end until it executes its program.
async fn exchange(
    ours: StdUnixStream,
    job: &Job,
    mut helper_end: tokio::sync::oneshot::Receiver<Exit>,
) -> Result<(Reply, Option<OwnedFd>, UnixStream)> {
    let what = || "talk to a helper".to_owned();
    ours.set_nonblocking(true).context(what)?;
    let mut ours = UnixStream::from_std(ours).context(what)?;
    let job = serde_json::to_vec(job)
        .map_err(std::io::Error::other)
        .context(what)?;
    ours.write_all(&job).await.context(what)?;
    ours.shutdown().await.context(what)?;
    let mut bytes = Vec::new();
    let mut master = None;
    let mut ended = false;
    while !bytes.ends_with(b"\n") && bytes.len() <= MAX_REPLY {
        let mut buffer = [0; 4096];
        let received = if ended {
            // The runtime may not know yet that there is something to read.
            receive(ours.as_raw_fd(), &mut buffer)
        } else {
            ours.try_io(Interest::READABLE, || {
                receive(ours.as_raw_fd(), &mut buffer)
            })
        };
        match received {
            Ok((0, _)) => break,
            Ok((n, fd)) => {
                bytes.extend_from_slice(buffer.get(..n).unwrap_or_default());
                master = fd.or(master);
            }
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                if ended {
                    break;
                }
                tokio::select! {
                    readable = ours.readable() => readable.context(what)?,
                    // What it has said is there by now.
                    _ = &mut helper_end => ended = true,
                }
            }
            Err(error) => return Err(error).context(what),
        }
    }
    match serde_json::from_slice(&bytes) {
        Ok(reply) => Ok((reply, master, ours)),
        Err(_) => Err(Error::Helper {
            code: Code::Internal,
            message: "the helper that makes processes died; out of memory?".to_owned(),
        }),
    }
}

/// Reads bytes and at most one descriptor.
fn receive(socket: RawFd, buffer: &mut [u8]) -> std::io::Result<(usize, Option<OwnedFd>)> {
    let mut space = cmsg_space!([RawFd; 1]);
    let mut iov = [IoSliceMut::new(buffer)];
    let message = recvmsg::<()>(
        socket,
        &mut iov,
        Some(&mut space),
        MsgFlags::MSG_CMSG_CLOEXEC,
    )?;
    let mut fd = None;
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(fds) = control {
            for raw in fds {
                // SAFETY: the kernel has just made this descriptor for us.
                fd = Some(unsafe { OwnedFd::from_raw_fd(raw) });
            }
        }
    }
    Ok((message.bytes, fd))
}

/// A helper process: does the job that comes in on descriptor `socket`.
pub fn main(socket: RawFd) -> std::process::ExitCode {
    if fcntl_cloexec(socket).is_err() {
        eprintln!("agent: a helper is started by the agent only");
        return std::process::ExitCode::FAILURE;
    }
    // SAFETY: the agent passed this descriptor to us for this purpose; fcntl has just shown that
    // it is open, and nothing else in this new process uses it.
    let mut socket = unsafe { StdUnixStream::from_raw_fd(socket) };
    // Rust's start-up ignores SIGPIPE, and programs inherit that: `yes | head` would never end.
    // SAFETY: resets a signal to its default; no handler of ours is involved.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) };
    // The agent must not be killed for lack of memory, and programs inherit that.
    let _ = std::fs::write("/proc/self/oom_score_adj", "0");
    // Standard error is the container's.
    std::panic::set_hook(Box::new(|_| {}));
    let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        let mut job = Vec::new();
        socket
            .read_to_end(&mut job)
            .map_err(|e| Failure::internal(format!("read the job: {e}")))?;
        let job = serde_json::from_slice(&job)
            .map_err(|e| Failure::internal(format!("read the job: {e}")))?;
        match job {
            Job::Create(job) => create::run(&job),
            Job::Exec(job) => exec::run(*job),
            Job::PidNamespace => pause::run(),
        }
    }));
    let outcome = outcome.unwrap_or_else(|_| {
        Err(Failure::internal(
            "the helper that makes processes panicked",
        ))
    });
    let (reply, master) = match outcome {
        Ok((pid, master)) => (
            Reply {
                pid: Some(pid),
                ..Reply::default()
            },
            master,
        ),
        Err(failure) => (
            Reply {
                pid: None,
                code: failure.code as i32,
                error: failure.message.chars().take(4096).collect(),
            },
            None,
        ),
    };
    let mut bytes = serde_json::to_vec(&reply).unwrap_or_default();
    bytes.push(b'\n');
    let fds: Vec<RawFd> = master.iter().map(AsRawFd::as_raw_fd).collect();
    let control = if fds.is_empty() {
        Vec::new()
    } else {
        vec![ControlMessage::ScmRights(&fds)]
    };
    // At most 20 KiB: fits into the socket's buffer in one piece.
    let sent = sendmsg::<()>(
        socket.as_raw_fd(),
        &[IoSlice::new(&bytes)],
        &control,
        MsgFlags::MSG_NOSIGNAL,
        None,
    );
    if sent.is_ok() && reply.pid.is_some() {
        std::process::ExitCode::SUCCESS
    } else {
        std::process::ExitCode::FAILURE
    }
}

fn fcntl_cloexec(fd: RawFd) -> nix::Result<()> {
    if fd < 3 {
        return Err(nix::errno::Errno::EBADF);
    }
    // SAFETY: F_SETFD takes no pointers; on a descriptor that is not open it fails.
    nix::errno::Errno::result(unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) }).map(drop)
}

/// Takes a terminal's master from a socket.
pub fn receive_master(socket: &StdUnixStream) -> std::io::Result<OwnedFd> {
    let mut buffer = [0; 256];
    receive(socket.as_raw_fd(), &mut buffer)?
        .1
        .ok_or_else(|| std::io::Error::other("no terminal came with the message"))
}
