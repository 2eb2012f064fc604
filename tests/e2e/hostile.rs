//! A guest kernel that keeps no rule, in one process with an honest neighbour: whatever it does, it
//! ends by itself or can be stopped, leaves nothing behind, and the neighbour's agent goes on
//! answering.
//!
//! `HOSTILE_ROUNDS` (a factor) and `HOSTILE_SEED` make it longer and other (`just test-walls`).

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use bulkhead_protocol::task;
use bulkhead_sandboxer::engine::Sandbox;
use bulkhead_sandboxer::engine::agent::Agent;
use bulkhead_sandboxer::engine::console::ConsoleHub;
use bulkhead_sandboxer::engine::microvm::MicroVm;
use bulkhead_sandboxer::engine::microvm::tap::create_tap;
use bulkhead_tests::env::{self, PATIENCE};
use bulkhead_tests::process::{Footprint, memory_beside_files};
use bulkhead_vmm::{Caching, DiskConfig, DiskSource, NetConfig, ShareConfig, VmConfig, VmExit};
use tokio::io::AsyncReadExt;

const MEMORY_MIB: u64 = 48;
/// What the guest looks for at the begin of its disk, and must not find beside its share.
const DISK_MARK: &[u8] = b"BULKHEAD-DISK";
const SECRET: &str = "BULKHEAD-SECRET";
/// What one hostile guest may make this process hold beyond its own memory, once it is gone.
const GROWTH_KIB: u64 = 4096;

/// Cases, their rounds in a short run, and whether the guest is expected to live to its end.
const CASES: [(&str, u64, bool); 19] = [
    ("registers", 20_000, true),
    ("setup", 5_000, true),
    ("storm", 1_000, true),
    // What devices write may be taken for descriptors, which may hit the guest itself.
    ("chains", 3_000, false),
    ("races", 200, false),
    ("resets", 400, true),
    ("fuse", 1_500, true),
    ("escape", 1, true),
    ("vsock", 800, true),
    ("streams", 100, true),
    ("agent", 100, true),
    ("block", 800, true),
    ("net", 400, true),
    ("balloon", 400, true),
    ("mem", 2_000, true),
    ("ports", 1_000, true),
    ("memory", 10_000, true),
    ("msrs", 4_000, true),
    // No firmware is where this processor goes on.
    ("init", 1, false),
];

/// A Linux guest whose agent is asked again and again.
struct Neighbour {
    vm: Arc<MicroVm>,
    waits: Receiver<Duration>,
    stop: Sender<()>,
    thread: JoinHandle<Result<(), String>>,
}

impl Neighbour {
    fn start() -> Self {
        let config = VmConfig {
            id: "neighbour".into(),
            kernel: env::vmlinux().unwrap(),
            cmdline: "quiet root=/dev/vda rootfstype=erofs ro init=/sbin/agent".into(),
            disks: vec![DiskConfig {
                source: DiskSource::Path(env::guest_image().unwrap()),
                read_only: true,
                serial: "bulkhead-root".into(),
            }],
            vsock_cid: Some(4),
            rng: true,
            ..VmConfig::default()
        };
        let vm = Arc::new(MicroVm::create(config, ConsoleHub::new(None)).unwrap());
        vm.vm().start().unwrap();
        let (told, waits) = mpsc::channel();
        let (stop, stopped) = mpsc::channel();
        let thread = {
            let vm = Arc::clone(&vm);
            std::thread::spawn(move || {
                // Said here: who waits for answers sees only that there are none.
                ask(vm, &told, &stopped).inspect_err(|error| eprintln!("neighbour: {error}"))
            })
        };
        let neighbour = Self {
            vm,
            waits,
            stop,
            thread,
        };
        neighbour.answers(1);
        neighbour
    }

    /// Waits for so many more answers; gives the times that all since the last call took, sorted.
    fn answers(&self, more: usize) -> Vec<Duration> {
        let mut waits: Vec<_> = self.waits.try_iter().collect();
        while waits.len() < more {
            let wait = self.waits.recv_timeout(PATIENCE);
            waits.push(wait.expect("an answer of the neighbour's agent"));
        }
        waits.sort();
        waits
    }

    fn end(self) {
        drop(self.stop);
        self.thread.join().unwrap().unwrap();
        assert_eq!(self.vm.vm().exit_reason(), None);
    }
}

fn ask(vm: Arc<MicroVm>, told: &Sender<Duration>, stopped: &Receiver<()>) -> Result<(), String> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|e| e.to_string())?;
    let result = runtime.block_on(async {
        let begin = Instant::now();
        let agent = loop {
            let attempt = match Agent::connect(vm.clone() as Arc<dyn Sandbox>).await {
                Ok(agent) => agent.hello().await.map(|_| agent),
                Err(e) => Err(e),
            };
            match attempt {
                Ok(agent) => break agent,
                Err(e) if begin.elapsed() > PATIENCE => return Err(e.to_string()),
                Err(_) => {}
            }
        };
        while stopped.try_recv() == Err(mpsc::TryRecvError::Empty) {
            let begin = Instant::now();
            agent.hello().await.map_err(|e| e.to_string())?;
            let _ = told.send(begin.elapsed());
        }
        Ok(())
    });
    runtime.shutdown_background();
    result
}

/// Calls an agent that lies as the daemon calls agents, until its VM has ended. Gives the number of
/// answers that were taken, and that of connections.
fn call(vm: &Arc<MicroVm>) -> (usize, usize) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let (mut answers, mut connections) = (0, 0);
    runtime.block_on(async {
        while vm.vm().exit_reason().is_none() {
            let attempt = async {
                let Ok(agent) = Agent::connect(Arc::clone(vm) as Arc<dyn Sandbox>).await else {
                    return;
                };
                connections += 1;
                let id = String::from("container");
                let exec_id = String::new();
                let tasks = agent.tasks();
                let state = task::StateRequest {
                    id: id.clone(),
                    exec_id: exec_id.clone(),
                };
                let stats = task::StatsRequest { id: id.clone() };
                answers += usize::from(agent.hello().await.is_ok());
                answers += usize::from(tasks.state(&state).await.is_ok());
                answers += usize::from(tasks.stats(&stats).await.is_ok());
                answers +=
                    usize::from(tasks.wait(&task::WaitRequest { id, exec_id }).await.is_ok());
                if let Ok(stream) = agent.stream("out").await {
                    let mut text = Vec::new();
                    let _ = stream.take(1 << 20).read_to_end(&mut text).await;
                }
            };
            // Some calls are never answered: the caller gives up.
            let _ = tokio::time::timeout(Duration::from_secs(1), attempt).await;
        }
    });
    // Threads that still connect know by now that the VM has ended.
    runtime.shutdown_timeout(PATIENCE);
    (answers, connections)
}

fn percentile(sorted: &[Duration], percent: usize) -> f64 {
    let index = (sorted.len() * percent / 100).min(sorted.len().saturating_sub(1));
    sorted
        .get(index)
        .map_or(0.0, |wait| wait.as_secs_f64() * 1e3)
}

/// What the guest has to attack: every device there is.
fn hostile(dir: &Path, case: &str, rounds: u64, seed: u64) -> VmConfig {
    let disk = dir.join("disk");
    let mut content = DISK_MARK.to_vec();
    content.resize(1 << 20, 0);
    fs::write(&disk, content).unwrap();
    let (tap, queue) = create_tap("hostile%d").unwrap();
    VmConfig {
        id: format!("hostile-{case}"),
        kernel: env::hostile_guest().unwrap(),
        cmdline: format!("hostile.case={case} hostile.rounds={rounds} hostile.seed={seed}"),
        memory_mib: MEMORY_MIB,
        disks: vec![DiskConfig {
            source: DiskSource::Path(disk),
            read_only: false,
            serial: "hostile".into(),
        }],
        spare_disk_slots: 1,
        shares: vec![ShareConfig {
            tag: "files".into(),
            root: dir.join("share"),
            read_only: false,
            caching: Caching::Never,
            upper_layers: false,
            fixed_top: false,
        }],
        nets: vec![NetConfig {
            tap,
            fd: Some(queue.into()),
            mac: Some([2, 0, 0, 0, 0, 9]),
            mtu: None,
            // The kernel's own queues must stop with the reset, too.
            vhost: case == "resets",
            plain: false,
        }],
        vsock_cid: Some(3),
        rng: true,
        balloon: true,
        room_mib: 128,
        ..VmConfig::default()
    }
}

/// Files around the share: what no guest may read or change.
fn files() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir_all(dir.path().join("share/inside")).unwrap();
    fs::write(dir.path().join("share/inside/file"), "in the share").unwrap();
    fs::write(dir.path().join("secret"), SECRET).unwrap();
    dir
}

#[test]
fn whatever_a_guest_does_it_does_to_itself() {
    let number = |name: &str| {
        std::env::var(name)
            .ok()
            .map(|text| text.parse::<u64>().unwrap())
    };
    let factor = number("HOSTILE_ROUNDS").unwrap_or(1);
    let seed = number("HOSTILE_SEED").unwrap_or(20_261_123);
    let neighbour = Neighbour::start();
    let quiet = neighbour.answers(200);
    println!(
        "{:<10} {:>8} {:>7} {:>8} {:>9} {:>9}  end",
        "case", "rounds", "s", "answers", "p50 ms", "p99 ms"
    );
    let row = |case: &str, rounds, seconds: f64, waits: &[Duration], end: &str| {
        println!(
            "{case:<10} {rounds:>8} {seconds:>7.1} {:>8} {:>9.2} {:>9.2}  {end}",
            waits.len(),
            percentile(waits, 50),
            percentile(waits, 99)
        );
    };
    row("(quiet)", 0, 0.0, &quiet, "");
    let mut before: Option<(Footprint, u64)> = None;
    let mut faults = Vec::new();
    for (case, rounds, lives) in CASES {
        let rounds = rounds * factor;
        let dir = files();
        let begin = Instant::now();
        let config = hostile(dir.path(), case, rounds, seed);
        let sandbox = Arc::new(MicroVm::create(config, ConsoleHub::new(None)).unwrap());
        let vm = sandbox.vm();
        vm.start().unwrap();
        vm.request_memory(32 << 20).unwrap();
        let calls = (case == "agent").then(|| {
            let sandbox = Arc::clone(&sandbox);
            std::thread::spawn(move || call(&sandbox))
        });
        // Only one case takes connections; they stay open until the guest resets its device.
        let vsock = vm.vsock().unwrap();
        let (held, open) = mpsc::channel();
        let connect = |_| {
            let held = held.clone();
            vsock.start_connect(7, move |outcome| _ = held.send(outcome))
        };
        let connections = if case == "agent" { 0 } else { 40 };
        let attempts: Vec<_> = (0..connections).map(connect).collect();
        let exit = vm.wait_timeout(PATIENCE * u32::try_from(factor).unwrap());
        let open = open.try_iter().filter(Result::is_ok).count();
        drop((attempts, held, vsock));
        if case == "streams" && open == 0 {
            faults.push("streams: no connection was made".to_owned());
        }
        let seconds = begin.elapsed().as_secs_f64();
        let text = String::from_utf8_lossy(&vm.console_tail()).into_owned();
        if let Some(calls) = calls {
            if exit.is_none() {
                // Nobody waits for its calls for ever, either.
                vm.stop();
            }
            match calls.join() {
                Ok((_, 0)) => faults.push("agent: no connection was made".to_owned()),
                Ok((answers, _)) => println!("agent: {answers} answers were taken for right ones"),
                Err(_) => faults.push("agent: a panic of the calling side".to_owned()),
            }
        }
        drop(sandbox);
        let after = Instant::now();
        let end = exit
            .as_ref()
            .map_or("hangs".to_owned(), ToString::to_string);
        row(case, rounds, seconds, &neighbour.answers(1), &end);
        let done = text.contains(&format!("hostile: {case} done"));
        if lives && (exit != Some(VmExit::Reset) || !done) {
            faults.push(format!(
                "{case}: the guest did not reach its end ({end}):\n{text}"
            ));
        }
        for sign in ["serves nobody", "ESCAPED", "no case", "panicked"] {
            if text.contains(sign) {
                faults.push(format!("{case}: {text}"));
            }
        }
        let secret = fs::read_to_string(dir.path().join("secret")).unwrap();
        let beside: Vec<_> = fs::read_dir(dir.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .collect();
        if secret != SECRET || beside.len() != 3 {
            faults.push(format!(
                "{case}: the share's surroundings changed: {beside:?}"
            ));
        }
        let memory = memory_beside_files(std::process::id(), MEMORY_MIB << 20).unwrap();
        let mut now = (Footprint::now().unwrap(), memory.anonymous);
        // A thread that connects to a guest ends with it, but not at the same moment.
        while before
            .as_ref()
            .is_some_and(|(footprint, _)| *footprint != now.0)
            && after.elapsed() < PATIENCE / 10
        {
            std::thread::park_timeout(Duration::from_millis(5));
            now.0 = Footprint::now().unwrap();
        }
        // The first VM may load what stays.
        let (footprint, kib) = before.get_or_insert_with(|| now.clone());
        if *footprint != now.0 {
            faults.push(format!(
                "{case}: left behind {:?} where there was {footprint:?}",
                now.0
            ));
        }
        if now.1 > *kib + GROWTH_KIB {
            faults.push(format!(
                "{case}: {} KiB of memory where there were {kib}",
                now.1
            ));
        }
    }
    neighbour.end();
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}
