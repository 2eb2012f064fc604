//! The guest's PID 1: runs containers for the host, over vsock.
//!
//! One thread with a tokio loop serves the [contract](bulkhead_protocol); helper processes
//! ([`helper`]) make containers. In a guest it is started as `/sbin/agent` by the kernel;
//! `agent --host …` runs the same service for one pod of ordinary containers on a host, and
//! `agent --test-listen DIR` in new namespaces of a host, for tests.

mod boot;
mod cgroup;
mod container;
mod devices;
mod disks;
mod error;
mod events;
mod helper;
mod hostmode;
mod initramfs;
mod layers;
mod log;
mod mounts;
mod net;
mod paths;
mod pid1;
mod reaper;
mod sandbox;
mod spec;
mod stdio;
mod streams;
mod tasks;
mod testmode;
mod transport;
mod users;

use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use bulkhead_protocol::server::{Router, SandboxDispatch, TaskDispatch};
use bulkhead_protocol::{CONTROL_PORT, STREAM_PORT};
use tokio::net::UnixStream;
use tokio::sync::mpsc;

use crate::events::Events;
use crate::mounts::Shares;
use crate::reaper::Reaper;
use crate::streams::Streams;
use crate::tasks::Tasks;
use crate::transport::{Listener, accept_forever};

/// Where this runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Place {
    /// In a guest, which is ours alone.
    Guest,
    /// On a host, for a pod of ordinary containers.
    Host,
    /// On a host for tests, where controllers may be missing.
    Test,
}

static PLACE: AtomicU8 = AtomicU8::new(Place::Guest as u8);

/// Says where this runs; at the start.
fn set_place(place: Place) {
    PLACE.store(place as u8, Ordering::Relaxed);
}

/// Whether this is a guest's PID 1.
pub fn in_guest() -> bool {
    PLACE.load(Ordering::Relaxed) == Place::Guest as u8
}

/// Whether this runs on an ordinary host for tests.
pub fn testing() -> bool {
    PLACE.load(Ordering::Relaxed) == Place::Test as u8
}

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args_os()
        .map(|a| a.to_string_lossy().into_owned())
        .collect();
    match args.get(1).map(String::as_str) {
        Some(helper::ARGUMENT) => {
            let socket = args.get(2).and_then(|a| a.parse().ok()).unwrap_or(-1);
            helper::main(socket)
        }
        Some("--version") => {
            println!("bulkhead-agent {}", env!("CARGO_PKG_VERSION"));
            ExitCode::SUCCESS
        }
        Some("--host") => hostmode::main(args.get(2..).unwrap_or_default()),
        Some("--test-listen") => testmode::main(args.get(2..).unwrap_or_default()),
        _ if std::process::id() == 1 => guest(),
        _ => {
            eprintln!(
                "agent: this is a guest's PID 1; to try it on a host: agent --test-listen DIR"
            );
            ExitCode::from(2)
        }
    }
}

/// PID 1 must not end: the kernel would panic. Whatever happens, the VM ends in order.
fn guest() -> ! {
    boot::reached("agent started");
    if initramfs::is_here() {
        error!("{}", initramfs::enter_image());
        pid1::go_down();
    }
    let outcome = std::panic::catch_unwind(|| {
        pid1::mount_all();
        boot::reached("mounted");
        log::use_kmsg();
        std::panic::set_hook(Box::new(|info| error!("panic: {info}")));
        pid1::read_command_line();
        pid1::raise_limits();
        pid1::be_quiet();
        nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o022));
        if let Err(error) = net::loopback_up() {
            warning!("bring lo up: {error}");
        }
        if sandbox::clock_is_unset() {
            info!("the wall clock is not set; the host should call SetTime");
        }
        let listeners = || {
            Ok((
                Listener::vsock(CONTROL_PORT)?,
                Listener::vsock(STREAM_PORT)?,
            ))
        };
        serve(listeners, Shares::default())
    });
    match outcome {
        Ok(Ok(())) => info!("going down"),
        Ok(Err(error)) => error!("cannot serve: {error}; is there a vsock device?"),
        Err(_) => error!("the agent panicked; going down"),
    }
    pid1::go_down()
}

/// Serves until Sandbox.Shutdown. `listen` is called within the runtime.
fn serve(
    listen: impl FnOnce() -> std::io::Result<(Listener, Listener)>,
    shares: Shares,
) -> std::io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async move {
        let reaper = Reaper::new();
        tokio::spawn(reaper.clone().run(Reaper::listen()?));
        let (control, streaming) = listen()?;
        boot::reached("listening");
        let streams = Arc::new(Streams::default());
        let tasks = Tasks::new(
            reaper,
            streams.clone(),
            Arc::new(Events::default()),
            Arc::new(shares),
        );
        let (down, mut go_down) = mpsc::channel(1);
        let router = Router::new()
            .with(TaskDispatch(Arc::new(tasks::Service(tasks.clone()))))
            .with(SandboxDispatch(Arc::new(sandbox::Service { tasks, down })));
        tokio::spawn(accept_forever(streaming, move |stream| {
            tokio::spawn(streams.clone().serve(stream));
        }));
        tokio::spawn(accept_forever(control, move |stream| {
            boot::reached("host connected");
            let router = router.clone();
            tokio::spawn(async move { serve_control(router, stream).await });
        }));
        let _ = go_down.recv().await;
        // Lets the answer to Shutdown, and the last output, reach the host.
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        Ok(())
    })
}

async fn serve_control(router: Router, stream: UnixStream) {
    if let Err(error) = router.serve(stream).await {
        info!("control connection: {error}");
    }
}
