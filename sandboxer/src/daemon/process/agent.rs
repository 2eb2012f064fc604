//! The agent of one pod: a process of this host, whose end is the pod's.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use bulkhead_protocol::{CONTROL_PORT, STREAM_PORT};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use tokio::net::UnixStream;

use crate::daemon::agent::link::Dial;
use crate::engine::EngineError;
use crate::timeouts;

/// What it says while it starts, at most, in bytes.
const MAX_SAID: usize = 16 << 10;
/// Time for a killed agent, and all in its PID namespace, to go.
const KILL_TIME: Duration = Duration::from_secs(10);

/// What an agent is started for.
#[derive(Debug)]
pub struct Launch<'a> {
    /// The agent.
    pub program: PathBuf,
    /// The pod's directory.
    pub directory: &'a Path,
    /// The pod's cgroup.
    pub cgroup: &'a Path,
    /// The host's mount namespace, if we have left it.
    pub mounts: Option<&'a File>,
    /// Path of the pod's network namespace; empty: none is made for it.
    pub network: &'a str,
    /// It has the host's network.
    pub host_network: bool,
    /// It has the host's IPC.
    pub host_ipc: bool,
}

impl Launch<'_> {
    fn arguments(&self) -> Vec<OsString> {
        let mut args: Vec<OsString> = vec!["--host".into()];
        let mut path = |option: &str, value: &Path| args.extend([option.into(), value.into()]);
        path("--directory", self.directory);
        path("--cgroup", self.cgroup);
        if let Some(mounts) = self.mounts {
            // By our descriptor, as there may be no other name for it.
            let link = format!("/proc/{}/fd/{}", std::process::id(), mounts.as_raw_fd());
            path("--mounts", Path::new(&link));
        }
        if !self.network.is_empty() {
            path("--network", Path::new(self.network));
        } else if !self.host_network {
            args.push("--no-network".into());
        }
        if self.host_ipc {
            args.push("--host-ipc".into());
        }
        args
    }
}

/// A running agent. Dropping it ends it and all in its PID namespace.
#[derive(Debug)]
pub struct HostAgent {
    pid: u32,
    process: OwnedFd,
    /// It ends when this is closed, as it is when we end in whatever way.
    _lifeline: Option<ChildStdin>,
}

impl HostAgent {
    /// Starts it. Blocks until it is ready.
    ///
    /// # Errors
    /// It cannot be executed, or the host refuses something to it.
    pub fn launch(launch: &Launch<'_>) -> Result<Self, EngineError> {
        let shown = launch.program.display();
        // No code of ours runs between fork and exec, so this is a cheap vfork.
        let mut starter = Command::new(&launch.program)
            .args(launch.arguments())
            .env_clear()
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(EngineError::io(format!("starting the agent {shown}")))?;
        let lifeline = starter.stdin.take();
        let said = match starter.stdout.take() {
            Some(stdout) => Said::new(stdout),
            None => return Err(EngineError::io("the agent")(io::ErrorKind::Other.into())),
        };
        let made = Self::follow(said, lifeline);
        // It ends once the agent itself has been made. If that is what hangs, its lifeline is cut
        // by now.
        if made.is_err() {
            let _ = starter.kill();
        }
        let _ = starter.wait();
        made.map_err(EngineError::io(format!("starting the agent {shown}")))
    }

    /// Listens to what it says: its pid, then how it went.
    fn follow(mut said: Said, lifeline: Option<ChildStdin>) -> io::Result<Self> {
        let refused = |line: &str| match line.strip_prefix("error ") {
            Some(reason) => io::Error::other(clean(reason)),
            None => io::Error::other(format!("it says {:?}", clean(line))),
        };
        let line = said.line()?;
        let pid: i32 = line
            .strip_prefix("pid ")
            .and_then(|n| n.parse().ok())
            .filter(|n| *n > 1)
            .ok_or_else(|| refused(&line))?;
        // It is our child, and nobody else waits for it: the number cannot be another's.
        let agent = Self {
            pid: pid.unsigned_abs(),
            process: open_process(pid)?,
            _lifeline: lifeline,
        };
        let line = said.line()?;
        match line.as_str() {
            "ready" => Ok(agent),
            _ => Err(refused(&line)),
        }
    }

    /// Its id.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Readable once it has ended.
    pub fn process(&self) -> BorrowedFd<'_> {
        self.process.as_fd()
    }

    /// How it has ended, if it has; it stays for [`Self::end`] to reap.
    pub fn how_it_ended(&self) -> String {
        let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT;
        match waitid(Id::PIDFd(self.process.as_fd()), flags) {
            Ok(WaitStatus::Exited(_, code)) => format!("its agent ended with exit code {code}"),
            Ok(WaitStatus::Signaled(_, signal, _)) => format!("its agent was killed by {signal}"),
            _ => "its agent has ended".to_owned(),
        }
    }

    /// Kills it, and with it all in its PID namespace.
    pub fn kill(&self) {
        // SAFETY: takes a descriptor of a process, which is open, a signal, no information and no
        // flags.
        unsafe {
            libc::syscall(
                libc::SYS_pidfd_send_signal,
                self.process.as_raw_fd(),
                libc::SIGKILL,
                std::ptr::null::<libc::siginfo_t>(),
                0,
            );
        }
    }

    /// Kills it, waits until it has gone, and reaps it. Doing it again does nothing. Blocks.
    pub fn end(&self) {
        self.kill();
        let mut fds = [PollFd::new(self.process.as_fd(), PollFlags::POLLIN)];
        let wait = PollTimeout::try_from(KILL_TIME).unwrap_or(PollTimeout::MAX);
        let _ = poll(&mut fds, wait);
        let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG;
        match waitid(Id::PIDFd(self.process.as_fd()), flags) {
            Ok(WaitStatus::StillAlive) => tracing::warn!(
                pid = self.pid,
                "a killed agent does not end: something in its pod hangs in the kernel"
            ),
            // No child: it was reaped before.
            Ok(_) | Err(nix::errno::Errno::ECHILD) => {}
            Err(error) => tracing::warn!(pid = self.pid, %error, "an agent cannot be waited for"),
        }
    }
}

impl Drop for HostAgent {
    fn drop(&mut self) {
        self.end();
    }
}

fn open_process(pid: i32) -> io::Result<OwnedFd> {
    // SAFETY: pidfd_open takes a pid and flags.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    let fd = nix::errno::Errno::result(fd)?;
    let fd = i32::try_from(fd).map_err(io::Error::other)?;
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Without what could play tricks with a log.
fn clean(text: &str) -> String {
    let printable = text.chars().filter(|c| !c.is_control());
    printable.take(1000).collect()
}

/// What a starting agent writes, line by line, within one time.
struct Said {
    from: ChildStdout,
    got: Vec<u8>,
    until: Instant,
}

impl Said {
    fn new(from: ChildStdout) -> Self {
        Self {
            from,
            got: Vec::new(),
            until: Instant::now() + timeouts::call(),
        }
    }

    fn line(&mut self) -> io::Result<String> {
        loop {
            if let Some(end) = self.got.iter().position(|b| *b == b'\n') {
                let rest = self.got.split_off(end + 1);
                let mut line = std::mem::replace(&mut self.got, rest);
                line.truncate(end);
                return Ok(String::from_utf8_lossy(&line).into_owned());
            }
            if self.got.len() > MAX_SAID {
                return Err(io::Error::other("it says too much"));
            }
            let left = self.until.saturating_duration_since(Instant::now());
            let mut fds = [PollFd::new(self.from.as_fd(), PollFlags::POLLIN)];
            let wait = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
            if poll(&mut fds, wait)? == 0 {
                return Err(io::ErrorKind::TimedOut.into());
            }
            let mut buffer = [0; 1024];
            let n = self.from.read(&mut buffer)?;
            if n == 0 {
                return Err(io::Error::other("it ended without a word"));
            }
            self.got
                .extend_from_slice(buffer.get(..n).unwrap_or_default());
        }
    }
}

/// The way to an agent's sockets.
#[derive(Debug)]
pub struct HostWay {
    control: PathBuf,
    streams: PathBuf,
}

impl HostWay {
    /// In the pod's directory. Short names: the path of a socket has at most 107 bytes.
    pub fn new(directory: &Path) -> Self {
        Self {
            control: directory.join("ctl.sock"),
            streams: directory.join("io.sock"),
        }
    }
}

impl Dial for HostWay {
    async fn dial(&self, port: u32) -> io::Result<UnixStream> {
        match port {
            CONTROL_PORT => UnixStream::connect(&self.control).await,
            STREAM_PORT => UnixStream::connect(&self.streams).await,
            _ => Err(io::ErrorKind::ConnectionRefused.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn launch(program: &str) -> Result<HostAgent, EngineError> {
        HostAgent::launch(&Launch {
            program: program.into(),
            directory: Path::new("/nonexistent"),
            cgroup: Path::new("/nonexistent"),
            mounts: None,
            network: "",
            host_network: false,
            host_ipc: false,
        })
    }

    #[test]
    fn why_an_agent_does_not_start_is_said() {
        let reason = |program| launch(program).expect_err("refused").to_string();
        assert!(reason("/nonexistent/agent").contains("No such file"));
        assert!(reason("/bin/true").contains("without a word"));
        assert!(
            reason("/bin/echo").contains("--host"),
            "what it says is shown"
        );
    }

    #[test]
    fn arguments_say_what_the_pod_shares() {
        let mounts = File::open("/proc/self/ns/mnt").expect("open");
        let mut launch = Launch {
            program: PathBuf::new(),
            directory: Path::new("/d"),
            cgroup: Path::new("/c"),
            mounts: Some(&mounts),
            network: "/n",
            host_network: false,
            host_ipc: true,
        };
        let text = |launch: &Launch<'_>| -> String {
            let words: Vec<_> = launch.arguments();
            let words: Vec<_> = words.iter().map(|w| w.to_string_lossy()).collect();
            words.join(" ")
        };
        let said = text(&launch);
        assert!(
            said.starts_with("--host --directory /d --cgroup /c --mounts /proc/"),
            "{said}"
        );
        assert!(said.ends_with("--network /n --host-ipc"), "{said}");
        launch.network = "";
        assert!(text(&launch).contains("--no-network"));
        launch.host_network = true;
        assert!(!text(&launch).contains("network"));
    }
}
