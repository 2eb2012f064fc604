//! The matrix of faults: every kind of sandbox, in both modes, at every step of a pod's life, and
//! what dies or runs out then. `cri --faults` runs it; `./dev test` has its short form in
//! `recovery.rs` and `worker.rs`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread::JoinHandle;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use bulkhead_tests::cri::containerd::{APP, IoType, Isolation, Node, OURS, PROCESS, WASM};
use bulkhead_tests::cri::proto::*;
use bulkhead_tests::cri::{Cri, TestPod, container, pod};
use bulkhead_tests::env::PATIENCE;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::host::Host;
use super::recovery::{pod_directories, until, until_lost};
use super::wasm;
use super::worker::{keeper_of, worker_of};

/// Where the daemon's state is.
const STATE: &str = "/run/bulkhead";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    /// kill -9 of the daemon, and its start.
    Daemon,
    /// The same of containerd.
    Containerd,
    /// The same of both.
    Both,
    /// kill -9 of the pod's own process with the VM.
    Worker,
    /// kill -9 of the pod's own process with the daemon's code.
    Keeper,
    /// The daemon can open nothing more, for a while.
    NoDescriptors,
    /// The daemon stands still, for a while.
    Frozen,
    /// The file system of the daemon's (and containerd's) state is full, for a while.
    NoSpace,
    /// The host's clock is an hour ahead, for a while.
    Clock,
    /// The daemon can map nothing as large as a guest's memory, for a while.
    NoMemory,
    /// Waits of the daemon, and of the pod's process, are interrupted all the time, for a while.
    Interrupted,
    /// The host has next to no memory left, for a while.
    HostMemory,
    /// A container takes all the memory that there is in the pod.
    GuestMemory,
    /// The pod's process with the VM stands still, its CPUs included, for a while.
    WorkerFrozen,
}

impl Fault {
    fn name(self) -> &'static str {
        match self {
            Self::Daemon => "kill -9 daemon",
            Self::Containerd => "kill -9 containerd",
            Self::Both => "kill -9 of both",
            Self::Worker => "kill -9 worker",
            Self::Keeper => "kill -9 keeper",
            Self::NoDescriptors => "EMFILE in daemon",
            Self::Frozen => "daemon stopped",
            Self::NoSpace => "ENOSPC in run_dir",
            Self::Clock => "clock jumps",
            Self::NoMemory => "ENOMEM in daemon",
            Self::Interrupted => "EINTR storm",
            Self::HostMemory => "host out of memory",
            Self::GuestMemory => "guest out of memory",
            Self::WorkerFrozen => "worker stopped",
        }
    }

    /// Whether a pod that runs is to go on.
    fn is_survived(self, isolation: Isolation) -> bool {
        match self {
            Self::Daemon | Self::Both => isolation == Isolation::Process,
            Self::Containerd
            | Self::NoDescriptors
            | Self::Frozen
            | Self::NoSpace
            | Self::Clock
            | Self::NoMemory
            | Self::Interrupted
            | Self::HostMemory
            | Self::GuestMemory
            | Self::WorkerFrozen => true,
            Self::Worker | Self::Keeper => false,
        }
    }
}

/// Where a pod is when it happens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    Starts,
    ContainerIsMade,
    Runs,
    Exec,
    Stops,
}

impl Step {
    const ALL: [(Self, &'static str); 5] = [
        (Self::Starts, "starts"),
        (Self::ContainerIsMade, "create"),
        (Self::Runs, "runs"),
        (Self::Exec, "exec"),
        (Self::Stops, "stops"),
    ];
}

/// A kind of sandbox on a node.
struct Kind<'a> {
    handler: &'a str,
    isolation: Isolation,
    /// Where the program of wasm pods is.
    volume: &'a Path,
}

impl Kind<'_> {
    fn spec(&self, name: &str) -> ContainerConfig {
        match self.handler {
            WASM => self.program(name, "/data/loop.wasm"),
            _ => container(name, "busybox", &["sleep", "100000"]),
        }
    }

    /// What takes all the memory that there is.
    fn hog(&self) -> ContainerConfig {
        let mut spec = match self.handler {
            WASM => self.program("hog", "/data/bomb.wasm"),
            // Keeps all that it reads, as there is no end of a line.
            _ => container("hog", "busybox", &["sh", "-c", "tail -n1 </dev/zero"]),
        };
        // A guest has an end by itself.
        if matches!(self.handler, WASM | PROCESS) {
            spec.linux
                .get_or_insert_default()
                .resources
                .get_or_insert_default()
                .memory_limit_in_bytes = 64 << 20;
        }
        spec
    }

    /// A wasm program.
    fn program(&self, name: &str, path: &str) -> ContainerConfig {
        let mut spec = container(name, "busybox", &[path]);
        spec.mounts = vec![Mount {
            container_path: "/data".into(),
            host_path: self.volume.display().to_string(),
            readonly: true,
            ..Mount::default()
        }];
        spec
    }

    fn fresh(&self, node: &Node) -> Result<()> {
        let pod = TestPod::run(node, self.handler, pod("fresh"))?;
        pod.start(&self.spec("c"))?;
        pod.remove()
    }
}

/// Each filter is about one column, or about steps, and leaves the others alone.
fn is_chosen(filters: &[String], name: &str) -> bool {
    let column = |name: &str| match name {
        "thread" | "process" => 0,
        OURS | APP | WASM | PROCESS => 1,
        _ if Step::ALL.iter().any(|(_, step)| *step == name) => 2,
        _ => 3,
    };
    let mut of_this = filters
        .iter()
        .filter(|f| column(f) == column(name))
        .peekable();
    of_this.peek().is_none() || of_this.any(|f| f == name)
}

/// Runs all of it and prints what came of it. Says whether all is well.
///
/// # Errors
/// A node cannot be had.
pub fn matrix(program: &Path, filters: &[String]) -> Result<bool> {
    let _state = SmallState::mount()?;
    let volume = tempfile::tempdir()?;
    for (name, text) in [("loop", wasm::LOOP), ("bomb", wasm::BOMB)] {
        let path = volume.path().join(format!("{name}.wasm"));
        fs::write(path, wat::parse_str(text)?)?;
    }
    let thread = [
        Fault::Daemon,
        Fault::Containerd,
        Fault::Both,
        Fault::NoDescriptors,
        Fault::Frozen,
        Fault::NoSpace,
        Fault::Clock,
        Fault::NoMemory,
        Fault::Interrupted,
        Fault::HostMemory,
        Fault::GuestMemory,
    ];
    let process = [Fault::Worker, Fault::Keeper, Fault::WorkerFrozen];
    let (mut cases, mut faults) = (0, Vec::new());
    println!(
        "{:<20} {:<8} {:<20} {:>6} {:>9}  failed",
        "kind", "mode", "fault", "cases", "survived"
    );
    for isolation in [Isolation::Thread, Isolation::Process] {
        let kinds: &[&str] = match isolation {
            Isolation::Thread => &[OURS, APP, WASM, PROCESS],
            Isolation::Process => &[OURS, APP, WASM],
        };
        let own = match isolation {
            Isolation::Thread => &[][..],
            Isolation::Process => &process[..],
        };
        let mode = format!("{isolation:?}").to_lowercase();
        let kinds: Vec<_> = kinds
            .iter()
            .filter(|kind| is_chosen(filters, kind))
            .collect();
        if kinds.is_empty() || !is_chosen(filters, &mode) {
            continue;
        }
        let mut node = Node::start_isolated(isolation, program, &["busybox"], IoType::Fifo)?;
        for handler in kinds {
            let kind = Kind {
                handler,
                isolation,
                volume: volume.path(),
            };
            // What a daemon has that has just been started and used once.
            node.kill_sandboxer();
            node.start_sandboxer()?;
            kind.fresh(&node)?;
            let mut before = Host::settled(&node)?;
            for fault in thread.iter().chain(own) {
                if !is_chosen(filters, fault.name()) {
                    continue;
                }
                let mut failed = Vec::new();
                let mut count = 0;
                for (step, name) in Step::ALL {
                    if !is_chosen(filters, name) {
                        continue;
                    }
                    // Wasm programs have no exec; a pod that starts has no worker to kill yet.
                    let of_pod = [
                        Fault::Worker,
                        Fault::Keeper,
                        Fault::WorkerFrozen,
                        Fault::GuestMemory,
                    ];
                    let too_early =
                        of_pod.contains(fault) && matches!(step, Step::Starts | Step::Stops);
                    if (*handler == WASM && step == Step::Exec) || too_early {
                        continue;
                    }
                    count += 1;
                    if let Err(error) = case(&mut node, &kind, *fault, step, &before) {
                        failed.push(name);
                        let what = format!("{handler}, {mode}, {}, {name}", fault.name());
                        // At once: the whole takes hours.
                        eprintln!("{what}: {error:#}\n{}", node.logs());
                        faults.push(format!("{what}: {error:#}"));
                        node.ensure_running()?;
                        let _ = clean(&node, handler);
                        // What it has left is not the next one's.
                        before = Host::settled(&node)?;
                    }
                }
                cases += count;
                println!(
                    "{handler:<20} {mode:<8} {:<20} {count:>6} {:>9}  {}",
                    fault.name(),
                    count - failed.len(),
                    failed.join(", ")
                );
            }
        }
    }
    println!(
        "{cases} cases, {} survived with nothing left, {} not",
        cases - faults.len(),
        faults.len()
    );
    for fault in &faults {
        println!("{fault}");
    }
    Ok(faults.is_empty())
}

/// Does something in a thread of its own; its answer is whatever containerd makes of the fault.
fn call(
    node: &Node,
    handler: &str,
    work: impl FnOnce(Cri) + Send + 'static,
) -> Result<JoinHandle<()>> {
    let cri = node.cri(handler)?;
    Ok(std::thread::spawn(move || work(cri)))
}

fn case(node: &mut Node, kind: &Kind<'_>, fault: Fault, step: Step, before: &Host) -> Result<()> {
    let handler = kind.handler;
    let neighbour = TestPod::run(node, handler, pod("neighbour"))?;
    let lucky = neighbour.start(&kind.spec("c"))?;
    let mut calls = Vec::new();
    let mut running = None;
    let target = match step {
        Step::Starts => {
            let there = pod_directories().len();
            calls.push(call(node, handler, |cri| {
                drop(cri.run_pod(&pod("target")))
            })?);
            until("the pod's directory", || pod_directories().len() > there)?;
            None
        }
        _ => Some(TestPod::run(node, handler, pod("target"))?),
    };
    if let Some(target) = &target {
        let (id, config) = (target.id.clone(), target.config.clone());
        match step {
            Step::Starts => {}
            Step::ContainerIsMade => {
                let spec = kind.spec("c");
                calls.push(call(node, handler, move |cri| {
                    drop(cri.create(&id, &config, &spec).and_then(|c| cri.start(&c)));
                })?);
            }
            Step::Runs => running = Some(target.start(&kind.spec("c"))?),
            Step::Exec => {
                let c = target.start(&kind.spec("c"))?;
                let exec = c.clone();
                calls.push(call(node, handler, move |cri| {
                    drop(cri.exec(&exec, &["sleep", "98765"]));
                })?);
                target.until(&c, "ps | grep '[9]8765'", "98765")?;
                running = Some(c);
            }
            Step::Stops => {
                target.start(&kind.spec("c"))?;
                calls.push(call(node, handler, move |cri| drop(cri.stop_pod(&id)))?);
            }
        }
    }
    happen(node, kind, fault, target.as_ref())?;
    let survived = fault.is_survived(kind.isolation);
    // An exec into a pod that goes on ends with the pod.
    let wait_first = step != Step::Exec || !survived;
    if wait_first {
        join(&mut calls)?;
    }
    if let (Some(c), Some(target)) = (&running, &target) {
        is_true(node, kind, target, c, survived).context("the pod")?;
    }
    let neighbours = match fault {
        Fault::Worker | Fault::Keeper => true,
        _ => survived,
    };
    is_true(node, kind, &neighbour, &lucky, neighbours).context("the neighbour")?;
    for pod in [Some(neighbour), target].into_iter().flatten() {
        forget(pod);
    }
    clean(node, handler)?;
    join(&mut calls)?;
    clean(node, handler)?;
    kind.fresh(node).context("a new pod")?;
    before.as_before(node).map(drop)
}

fn join(calls: &mut Vec<JoinHandle<()>>) -> Result<()> {
    for call in calls.drain(..) {
        let Ok(()) = call.join() else {
            bail!("a calling thread panicked");
        };
    }
    Ok(())
}

/// Its connection may be that of a containerd that has died.
fn forget(mut pod: TestPod) {
    pod.id.clear();
}

/// The fault, and its end.
fn happen(node: &mut Node, kind: &Kind<'_>, fault: Fault, target: Option<&TestPod>) -> Result<()> {
    let handler = kind.handler;
    let worker = target.filter(|_| kind.isolation == Isolation::Process);
    let signal =
        |pid: u32, signal| -> Result<()> { Ok(kill(Pid::from_raw(i32::try_from(pid)?), signal)?) };
    let with = |what: &str| worker.with_context(|| format!("no pod with a {what}"));
    match fault {
        Fault::Daemon => {
            node.kill_sandboxer();
            node.start_sandboxer()
        }
        Fault::Containerd => {
            node.kill_containerd();
            node.start_containerd()
        }
        Fault::Both => {
            node.kill_containerd();
            node.kill_sandboxer();
            node.start_sandboxer()?;
            node.start_containerd()
        }
        Fault::Worker => signal(worker_of(with("worker")?)?, Signal::SIGKILL),
        Fault::Keeper => signal(keeper_of(with("keeper")?)?, Signal::SIGKILL),
        Fault::NoDescriptors => {
            let pid = node.sandboxer_pid();
            let open = fs::read_dir(format!("/proc/{pid}/fd"))?.count();
            let limits = fs::read_to_string(format!("/proc/{pid}/limits"))?;
            let usual = limits
                .lines()
                .find_map(|l| l.strip_prefix("Max open files")?.split_whitespace().next())
                .context("limits")?;
            limit(pid, "nofile", &open.to_string())?;
            // Somebody wants something meanwhile; of another kind, it would leave a connection of
            // containerd's to that kind's socket, which was not there before.
            if let Ok(pod) = TestPod::run(node, handler, pod("meanwhile")) {
                pod.remove()?;
            }
            limit(pid, "nofile", usual)
        }
        Fault::Frozen => {
            let pid = node.sandboxer_pid();
            signal(pid, Signal::SIGSTOP)?;
            let begin = Instant::now();
            while begin.elapsed().as_secs() < 3 {
                // What is asked of it meanwhile waits, or fails in time.
                let _ = node.cri(OURS)?.pods();
            }
            signal(pid, Signal::SIGCONT)
        }
        Fault::NoSpace => {
            let full = Full::of(Path::new(STATE))?;
            if let Ok(pod) = TestPod::run(node, handler, pod("meanwhile")) {
                forget(pod);
            }
            drop(full);
            Ok(())
        }
        Fault::Clock => {
            shift_clock(3600)?;
            let pods = node.cri(OURS)?.pods();
            shift_clock(-3600)?;
            pods.map(drop)
        }
        Fault::NoMemory => {
            let pid = node.sandboxer_pid();
            let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
            let now = status
                .lines()
                .find_map(|l| l.strip_prefix("VmSize:")?.split_whitespace().next())
                .context("VmSize")?;
            // What the heap takes is there; a guest's memory, or a stack for a program, is not.
            let most = (now.parse::<u64>()? << 10) + (96 << 20);
            limit(pid, "as", &most.to_string())?;
            if let Ok(pod) = TestPod::run(node, handler, pod("meanwhile")) {
                forget(pod);
            }
            limit(pid, "as", "unlimited")
        }
        Fault::Interrupted => {
            let mut pids = vec![node.sandboxer_pid()];
            if let Some(pod) = worker {
                // It may not be there yet, or not any more.
                pids.extend(worker_of(pod).ok());
            }
            for _ in 0..500 {
                for pid in &pids {
                    // A wait is interrupted by being stopped, whatever it waits for.
                    let _ = signal(*pid, Signal::SIGSTOP);
                    let _ = signal(*pid, Signal::SIGCONT);
                }
            }
            node.cri(OURS)?.pods().map(drop)
        }
        Fault::HostMemory => {
            let full = HostFull::fill()?;
            if let Ok(pod) = TestPod::run(node, handler, pod("meanwhile")) {
                forget(pod);
            }
            drop(full);
            Ok(())
        }
        Fault::GuestMemory => {
            let target = target.context("no pod")?;
            let hog = target.start(&kind.hog())?;
            let code = target.cri.wait_exit(&hog, PATIENCE)?.exit_code;
            ensure!(code != 0, "it has had all that it wanted");
            Ok(())
        }
        Fault::WorkerFrozen => {
            let pid = worker_of(with("worker")?)?;
            signal(pid, Signal::SIGSTOP)?;
            std::thread::sleep(std::time::Duration::from_secs(3));
            signal(pid, Signal::SIGCONT)
        }
    }
}

/// A file system of its own for the daemon's state, which can be filled without filling the host's
/// memory.
struct SmallState;

impl SmallState {
    fn mount() -> Result<Self> {
        fs::create_dir_all(STATE)?;
        let (kind, data) = (Some("tmpfs"), Some("size=16m,mode=755"));
        mount(kind, STATE, kind, MsFlags::empty(), data)?;
        Ok(Self)
    }
}

impl Drop for SmallState {
    fn drop(&mut self) {
        let _ = umount2(STATE, MntFlags::MNT_DETACH);
    }
}

/// A file that leaves nothing of its file system, as long as this lives.
struct Full(PathBuf);

impl Full {
    fn of(dir: &Path) -> Result<Self> {
        let full = Self(dir.join("full"));
        let mut file = fs::File::create(&full.0)?;
        let block = vec![0; 1 << 20];
        for size in [1 << 20, 1 << 12, 1] {
            while std::io::Write::write(&mut file, &block[..size]).is_ok() {}
        }
        Ok(full)
    }
}

impl Drop for Full {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

/// A file system in memory that leaves the host next to none, as long as this lives.
struct HostFull(tempfile::TempDir);

impl HostFull {
    /// What is left, in bytes: less than a guest's memory.
    const LEFT: u64 = 160 << 20;

    fn fill() -> Result<Self> {
        let dir = tempfile::tempdir()?;
        let (kind, data) = (Some("tmpfs"), Some("size=100%"));
        mount(kind, dir.path(), kind, MsFlags::empty(), data)?;
        let full = Self(dir);
        let mut file = fs::File::create(full.0.path().join("full"))?;
        let block = vec![1; 1 << 20];
        while available()? > Self::LEFT {
            std::io::Write::write_all(&mut file, &block)?;
        }
        Ok(full)
    }
}

impl Drop for HostFull {
    fn drop(&mut self) {
        let _ = umount2(self.0.path(), MntFlags::MNT_DETACH);
    }
}

/// Memory that the host can give, in bytes.
fn available() -> Result<u64> {
    let text = fs::read_to_string("/proc/meminfo")?;
    let line = text.lines().find_map(|l| l.strip_prefix("MemAvailable:"));
    let kib = line
        .and_then(|l| l.split_whitespace().next())
        .context("MemAvailable")?;
    Ok(kib.parse::<u64>()? << 10)
}

fn shift_clock(seconds: i64) -> Result<()> {
    use nix::time::{ClockId, clock_gettime, clock_settime};
    let now = clock_gettime(ClockId::CLOCK_REALTIME)?;
    let then = nix::sys::time::TimeSpec::new(now.tv_sec() + seconds, now.tv_nsec());
    Ok(clock_settime(ClockId::CLOCK_REALTIME, then)?)
}

/// Sets what prlimit(1) calls `what`.
fn limit(pid: u32, what: &str, limit: &str) -> Result<()> {
    let done = Command::new("prlimit")
        .args(["--pid", &pid.to_string(), &format!("--{what}={limit}:")])
        .status()
        .context("prlimit")?;
    ensure!(done.success(), "prlimit: {done}");
    Ok(())
}

/// What containerd says of a pod that goes on, or has ended, is so.
fn is_true(node: &Node, kind: &Kind<'_>, pod: &TestPod, c: &str, goes_on: bool) -> Result<()> {
    let there = TestPod {
        cri: node.cri(kind.handler)?,
        config: pod.config.clone(),
        id: pod.id.clone(),
    };
    let result = truth(kind, &there, c, goes_on);
    forget(there);
    result
}

fn truth(kind: &Kind<'_>, pod: &TestPod, c: &str, goes_on: bool) -> Result<()> {
    if !goes_on {
        return until_lost(pod, c);
    }
    let state = pod.cri.pod_status(&pod.id)?.state;
    ensure!(state == SANDBOX_READY, "the pod is not ready");
    let state = pod.cri.status(c)?.state;
    ensure!(state == CONTAINER_RUNNING, "the container does not run");
    if kind.handler != WASM {
        let answer = pod.sh(c, "echo well")?;
        ensure!(answer == "well\n", "{answer:?}");
    }
    Ok(())
}

/// What kubelet does with pods that nobody wants.
fn clean(node: &Node, handler: &str) -> Result<()> {
    let cri = node.cri(handler)?;
    let begin = Instant::now();
    loop {
        let pods = cri.pods()?;
        if pods.is_empty() {
            return Ok(());
        }
        let mut last = Ok(());
        for pod in pods {
            last = cri.stop_pod(&pod.id).and_then(|()| cri.remove_pod(&pod.id));
        }
        ensure!(
            last.is_ok() || begin.elapsed() < PATIENCE,
            "pods cannot be removed: {last:?}"
        );
    }
}
