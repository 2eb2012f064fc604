//! `agent --test-listen DIR [TAG=PATH ...]`: the same service on an ordinary host, as root.
//!
//! New namespaces stand in for the guest, `DIR/control.sock` and `DIR/stream.sock` for the vsock
//! ports, and bind mounts of `PATH` for the virtio-fs devices of `TAG`. Containers can be made,
//! joined, signalled and looked at. What needs controllers of cgroup v2 that the host keeps for
//! itself is tested in a VM.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, fork};
use tokio::net::UnixListener;

use crate::mounts::Shares;
use crate::transport::Listener;
use crate::{Place, cgroup, log, net, set_place};

/// Runs the mode.
pub fn main(args: &[String]) -> ExitCode {
    match run(args) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("agent: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &[String]) -> std::io::Result<ExitCode> {
    let directory = args
        .first()
        .map(PathBuf::from)
        .ok_or_else(|| std::io::Error::other("usage: agent --test-listen DIR [TAG=PATH ...]"))?;
    let stand_ins: BTreeMap<String, PathBuf> = args
        .iter()
        .skip(1)
        .filter_map(|a| a.split_once('='))
        .map(|(tag, path)| (tag.to_owned(), PathBuf::from(path)))
        .collect();
    set_place(Place::Test);
    log::set_level(log::Level::Info);
    // With the test that starts this.
    nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL)?;
    // Sockets first: /run and /tmp are about to change.
    let control = std::os::unix::net::UnixListener::bind(directory.join("control.sock"))?;
    let streaming = std::os::unix::net::UnixListener::bind(directory.join("stream.sock"))?;
    control.set_nonblocking(true)?;
    streaming.set_nonblocking(true)?;
    println!("listening");
    // A cgroup of our own, so that what we make stays below it.
    let own_cgroup = make_own_cgroup();
    unshare(CloneFlags::CLONE_NEWPID)?;
    // SAFETY: this process has a single thread, so the child may do anything.
    match unsafe { fork() }? {
        ForkResult::Parent { child } => {
            let status = loop {
                match waitpid(child, None) {
                    Ok(WaitStatus::Exited(_, code)) => break u8::try_from(code).unwrap_or(1),
                    Ok(WaitStatus::Signaled(..)) | Err(_) => break 1,
                    Ok(_) => {}
                }
            };
            remove_own_cgroup(own_cgroup);
            Ok(ExitCode::from(status))
        }
        ForkResult::Child => {
            // The parent dies with the test that started it, and this with the parent.
            nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL)?;
            set_up_namespaces(own_cgroup.as_deref())?;
            let listeners = || {
                Ok((
                    Listener::Unix(UnixListener::from_std(control)?),
                    Listener::Unix(UnixListener::from_std(streaming)?),
                ))
            };
            crate::serve(listeners, Shares::with_stand_ins(stand_ins))?;
            Ok(ExitCode::SUCCESS)
        }
    }
}

fn set_up_namespaces(own_cgroup: Option<&Path>) -> std::io::Result<()> {
    if let Some(cgroup) = own_cgroup {
        fs::write(cgroup.join("cgroup.procs"), "0")?;
    }
    unshare(
        CloneFlags::CLONE_NEWNS
            | CloneFlags::CLONE_NEWUTS
            | CloneFlags::CLONE_NEWIPC
            | CloneFlags::CLONE_NEWNET
            | CloneFlags::CLONE_NEWCGROUP,
    )?;
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)?;
    mount(Some("proc"), "/proc", Some("proc"), MsFlags::empty(), none)?;
    mount(Some("tmpfs"), "/run", Some("tmpfs"), MsFlags::empty(), none)?;
    // Over the host's v1 controllers, if that is what it has.
    match mount(
        Some("cgroup2"),
        cgroup::ROOT,
        Some("cgroup2"),
        MsFlags::empty(),
        none,
    ) {
        Ok(()) => cgroup::set_up(),
        Err(errno) => crate::warning!("no cgroup v2 here ({errno}); going on without"),
    }
    net::loopback_up()
}

/// The host's cgroup v2 hierarchy, wherever it is mounted.
fn hierarchy() -> Option<PathBuf> {
    ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"]
        .into_iter()
        .map(PathBuf::from)
        .find(|p| p.join("cgroup.controllers").exists())
}

fn make_own_cgroup() -> Option<PathBuf> {
    let path = hierarchy()?.join(format!("bulkhead-agent-test-{}", std::process::id()));
    fs::create_dir(&path).ok()?;
    Some(path)
}

fn remove_own_cgroup(path: Option<PathBuf>) {
    let Some(path) = path else { return };
    // Whatever was in it ended with the pid namespace.
    cgroup::remove_children(&path, 0);
    let _ = fs::remove_dir(&path);
}
