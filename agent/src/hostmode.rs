//! `agent --host DIR …`: the agent of one pod of ordinary containers, on the host itself.
//!
//! The daemon starts it, one process for each pod. In place of a guest it has namespaces of its
//! own: PIDs (it is PID 1 of them, so that all of the pod ends with it), mounts, host name, IPC and
//! cgroups, and the network that CNI has made. In place of vsock there are two sockets in the pod's
//! directory. All that it mounts is seen by the pod alone and goes with it.
//!
//! It ends with the daemon: its standard input is a pipe that nobody but the daemon holds.

use std::fs;
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener as StdUnixListener;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};
use tokio::io::Interest;
use tokio::net::UnixListener;

use crate::mounts::{RUN_DIR, Shares};
use crate::transport::{Listener, watch};
use crate::{Place, cgroup, error, net, set_place};

/// Socket of control calls, in the pod's directory.
const CONTROL: &str = "ctl.sock";
/// Socket of streams.
const STREAMS: &str = "io.sock";
/// The host's files as the host sees them, without what is mounted here.
const HOST_ROOT: &str = "/run/bulkhead/host";

/// What the daemon says.
#[derive(Debug, Default, PartialEq, Eq)]
struct Args {
    /// The pod's directory.
    directory: PathBuf,
    /// The pod's cgroup, which is there and empty.
    cgroup: PathBuf,
    /// Mount namespace to begin with; empty: that of the caller.
    mounts: PathBuf,
    /// Network namespace; empty: that of the caller.
    network: PathBuf,
    /// A new network namespace, with nothing but a loopback.
    no_network: bool,
    /// The caller's IPC namespace.
    host_ipc: bool,
}

impl Args {
    fn parse(args: &[String]) -> Result<Self, String> {
        let mut parsed = Self::default();
        let mut args = args.iter();
        while let Some(arg) = args.next() {
            let mut path = || match args.next() {
                Some(value) if value.starts_with('/') => Ok(PathBuf::from(value)),
                _ => Err(format!("{arg} needs an absolute path")),
            };
            match arg.as_str() {
                "--directory" => parsed.directory = path()?,
                "--cgroup" => parsed.cgroup = path()?,
                "--mounts" => parsed.mounts = path()?,
                "--network" => parsed.network = path()?,
                "--no-network" => parsed.no_network = true,
                "--host-ipc" => parsed.host_ipc = true,
                other => return Err(format!("{other} is no option")),
            }
        }
        if parsed.directory.as_os_str().is_empty() || parsed.cgroup.as_os_str().is_empty() {
            return Err("--directory and --cgroup are needed".to_owned());
        }
        Ok(parsed)
    }
}

/// Runs the mode. What becomes of it is said on standard output, a line for each step: `pid N` as
/// the caller sees it, then `ready` or `error TEXT`.
pub fn main(args: &[String]) -> ExitCode {
    set_place(Place::Host);
    match start(args) {
        Ok(code) => code,
        Err(text) => {
            say(&format!("error {}", text.replace('\n', "; ")));
            ExitCode::FAILURE
        }
    }
}

/// Best effort: a daemon that has gone does not listen.
fn say(line: &str) {
    let mut out = io::stdout();
    let _ = writeln!(out, "{line}").and_then(|()| out.flush());
}

fn start(args: &[String]) -> Result<ExitCode, String> {
    let args = Args::parse(args)?;
    let because = |what: &str| {
        let what = what.to_owned();
        move |e: io::Error| format!("{what}: {e}")
    };
    // While paths still mean what the daemon means.
    let control = bind(&args.directory.join(CONTROL)).map_err(because("control socket"))?;
    let streams = bind(&args.directory.join(STREAMS)).map_err(because("stream socket"))?;
    let mounts = open(&args.mounts).map_err(because("mount namespace"))?;
    let network = open(&args.network).map_err(because("network namespace"))?;
    enter_cgroup(&args.cgroup).map_err(because("cgroup"))?;
    if let Some(network) = network {
        setns(network, CloneFlags::CLONE_NEWNET)
            .map_err(|e| because("enter the network namespace")(e.into()))?;
    }
    if let Some(mounts) = mounts {
        setns(mounts, CloneFlags::CLONE_NEWNS)
            .map_err(|e| because("enter the mount namespace")(e.into()))?;
    }
    let pid = fork_into_new_pids().map_err(because("PID namespace"))?;
    if pid != 0 {
        say(&format!("pid {pid}"));
        return Ok(ExitCode::SUCCESS);
    }
    isolate(&args).map_err(|(what, e)| because(what)(e))?;
    nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o022));
    // Its end is the pod's: among the last that the kernel takes.
    let _ = fs::write("/proc/self/oom_score_adj", "-998");
    say("ready");
    let null = fs::File::options().write(true).open("/dev/null");
    if let Ok(null) = null {
        // The daemon reads until here.
        let _ = nix::unistd::dup2_stdout(null);
    }
    let listeners = move || {
        end_with_the_daemon()?;
        Ok((
            Listener::Host(UnixListener::from_std(control)?),
            Listener::Host(UnixListener::from_std(streams)?),
        ))
    };
    let shares = Shares::of_host(PathBuf::from(HOST_ROOT));
    crate::serve(listeners, shares).map_err(because("serve"))?;
    Ok(ExitCode::SUCCESS)
}

fn bind(path: &Path) -> io::Result<StdUnixListener> {
    let listener = StdUnixListener::bind(path)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

fn open(path: &Path) -> io::Result<Option<fs::File>> {
    match path.as_os_str().is_empty() {
        true => Ok(None),
        false => fs::File::open(path).map(Some),
    }
}

/// The pod's cgroup becomes the root of what is seen here. No process stays in it: only then may
/// those below have controllers.
fn enter_cgroup(cgroup: &Path) -> io::Result<()> {
    fs::write(cgroup.join("cgroup.procs"), "0")?;
    unshare(CloneFlags::CLONE_NEWCGROUP)?;
    let own = cgroup.join("agent");
    fs::create_dir_all(&own)?;
    fs::write(own.join("cgroup.procs"), "0")
}

/// Goes on as PID 1 of a new namespace, and gives 0 there: a child of our parent's, who can wait
/// for it. Here, gives its id.
fn fork_into_new_pids() -> io::Result<i32> {
    unshare(CloneFlags::CLONE_NEWPID)?;
    // SAFETY: no stack is given, so the child goes on with a copy of this one, as after fork; this
    // process has a single thread, so no lock can be held by another.
    let pid = unsafe {
        libc::syscall(
            libc::SYS_clone,
            libc::c_long::from(libc::CLONE_PARENT | libc::SIGCHLD),
            0,
            0,
            0,
            0,
        )
    };
    let pid = nix::errno::Errno::result(pid)?;
    i32::try_from(pid).map_err(io::Error::other)
}

/// Namespaces of our own, and in them what a guest would have.
fn isolate(args: &Args) -> Result<(), (&'static str, io::Error)> {
    let because = |what: &'static str| move |e: nix::errno::Errno| (what, io::Error::from(e));
    let mut flags = CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWUTS;
    flags.set(CloneFlags::CLONE_NEWIPC, !args.host_ipc);
    flags.set(CloneFlags::CLONE_NEWNET, args.no_network);
    unshare(flags).map_err(because("namespaces"))?;
    let none = None::<&str>;
    // The host's later mounts appear here, ours do not appear there.
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_SLAVE, none)
        .map_err(because("mount propagation"))?;
    fs::create_dir_all(RUN_DIR).map_err(|e| (RUN_DIR, e))?;
    let strict = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    let files = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    let data = Some("mode=755");
    mount(Some("tmpfs"), RUN_DIR, Some("tmpfs"), files, data).map_err(because("tmpfs"))?;
    fs::create_dir(HOST_ROOT).map_err(|e| (HOST_ROOT, e))?;
    let recursively = MsFlags::MS_BIND | MsFlags::MS_REC;
    mount(Some("/"), HOST_ROOT, none, recursively, none).map_err(because("the host's files"))?;
    // The copy has the tmpfs, too.
    let covered = format!("{HOST_ROOT}{RUN_DIR}");
    umount2(covered.as_str(), MntFlags::MNT_DETACH).map_err(because("the host's files"))?;
    mount(Some("proc"), "/proc", Some("proc"), strict, none).map_err(because("proc"))?;
    // The same file system cannot be mounted on itself, not even by another root.
    let _ = umount2(cgroup::ROOT, MntFlags::MNT_DETACH);
    let cgroups = Some("cgroup2");
    mount(cgroups, cgroup::ROOT, cgroups, strict, none).map_err(because("cgroups"))?;
    cgroup::set_up();
    match args.no_network {
        true => net::loopback_up().map_err(|e| ("loopback", e)),
        false => Ok(()),
    }
}

/// The pipe ends when its only writer has gone, however that went.
fn end_with_the_daemon() -> io::Result<()> {
    let pipe: OwnedFd = io::stdin().as_fd().try_clone_to_owned()?;
    let pipe = watch(pipe, Interest::READABLE)?;
    tokio::spawn(async move {
        // Nothing is ever written: what makes it readable is its end.
        let _ = pipe.readable().await;
        error!("the daemon has gone; ending the pod");
        // PID 1: the kernel kills all others.
        std::process::exit(1);
    });
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_daemon_says_is_checked() {
        let parse = |text: &str| {
            let words: Vec<String> = text.split_whitespace().map(str::to_owned).collect();
            Args::parse(&words)
        };
        let args = parse("--directory /d --cgroup /c --network /n --host-ipc").unwrap();
        assert_eq!(args.network, Path::new("/n"));
        assert!(args.host_ipc && !args.no_network && args.mounts.as_os_str().is_empty());
        for bad in [
            "",
            "--directory /d",
            "--cgroup /c",
            "--directory d --cgroup /c",
            "--directory /d --cgroup",
            "--directory /d --cgroup /c --other",
        ] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
