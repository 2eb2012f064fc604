//! Stock containerd, by CRI, with our daemon as its sandbox plugin: every test runs as a user of
//! Kubernetes would have it, and the tests of plain pods run against runc too, to know that the
//! tests themselves are right.
//!
//! usage: cri [--handler HANDLER] [--io fifo|streaming|both] [--isolation thread|process] [FILTER...]
//!        cri --soak PODS     (makes and removes that many, and counts what is left)
//!        cri --faults [MODE|RUNTIME|FAULT|STEP...]   (the matrix of faults, or a part of it)
//!        cri [--handler HANDLER] [--io fifo|streaming] --run COMMAND...
//!                            (runs a suite of others' on a node whose pods all have that runtime)

use std::process::{Command, ExitCode};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use bulkhead_tests::cri::containerd::{IoType, Isolation, Node, OURS, Purpose};

#[path = "cri/app.rs"]
mod app;
#[path = "cri/artifact.rs"]
mod artifact;
#[path = "cri/basic.rs"]
mod basic;
#[path = "cri/failure.rs"]
mod failure;
#[path = "cri/faults.rs"]
mod faults;
#[path = "cri/growth.rs"]
mod growth;
#[path = "cri/host.rs"]
mod host;
#[path = "cri/mixed.rs"]
mod mixed;
#[path = "cri/process.rs"]
mod process;
#[path = "cri/recovery.rs"]
mod recovery;
#[path = "cri/storage.rs"]
mod storage;
#[path = "cri/template.rs"]
mod template;
#[path = "cri/validation.rs"]
mod validation;
#[path = "cri/vmmctl.rs"]
mod vmmctl;
#[path = "cri/walls.rs"]
mod walls;
#[path = "cri/wasm.rs"]
mod wasm;
#[path = "cri/wide.rs"]
mod wide;
#[path = "cri/worker.rs"]
mod worker;

/// A test: its name, whether runc can do it too, and what it does.
type Test = (&'static str, bool, fn(&mut Node, &str) -> Result<()>);

/// Tests in which the way of standard streams matters.
const STREAMS: &[&str] = &[
    "first_pod",
    "nothing_is_left",
    "interactive_exec",
    "attach",
    "much_output",
    "stop_gracefully",
    "log_rotation",
    "terminal_and_environment",
    "containerd_restarts",
    "app_pod",
    "app_attach",
];

/// Tests of pods whose VMs are in processes of their own that run if nothing is asked for: the others
/// take a minute each. All do with `--isolation process`.
const ISOLATED: &[&str] = &["worker_is_jailed", "pod_outlives_its_daemon", "wasm_pod"];

fn main() -> ExitCode {
    match run() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<bool> {
    let (mut handler, mut filters) = (OURS.to_owned(), Vec::new());
    let (mut ios, mut soak) = (vec![IoType::Fifo, IoType::Streaming], None);
    let mut isolation = None;
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "--handler" => handler = args.next().unwrap_or_default(),
            "--io" => match args.next().as_deref() {
                Some("fifo") => ios = vec![IoType::Fifo],
                Some("streaming") => ios = vec![IoType::Streaming],
                Some("both") => ios = vec![IoType::Fifo, IoType::Streaming],
                other => bail!("--io {other:?}: fifo, streaming or both"),
            },
            "--isolation" => match args.next().as_deref() {
                Some("thread") => isolation = Some(Isolation::Thread),
                Some("process") => isolation = Some(Isolation::Process),
                other => bail!("--isolation {other:?}: thread or process"),
            },
            "--run" => return run_suite(&handler, &ios, &args.collect::<Vec<_>>()),
            "--faults" => {
                let program = bulkhead_tests::env::built("sandboxer")?;
                return faults::matrix(&program, &args.collect::<Vec<_>>());
            }
            "--soak" => {
                let count: usize = args.next().unwrap_or_default().parse()?;
                soak = Some(count);
            }
            _ => filters.push(arg),
        }
    }
    let all = [
        basic::TESTS,
        wide::TESTS,
        validation::TESTS,
        failure::TESTS,
        recovery::TESTS,
        storage::TESTS,
        growth::TESTS,
        template::TESTS,
        wasm::TESTS,
        artifact::TESTS,
        mixed::TESTS,
        app::TESTS,
        process::TESTS,
        vmmctl::TESTS,
        worker::TESTS,
        walls::TESTS,
    ];
    let all: Vec<&Test> = all
        .into_iter()
        .flatten()
        .filter(|t| handler == OURS || t.1)
        .filter(|t| filters.is_empty() || filters.iter().any(|f| t.0.contains(f.as_str())))
        .collect();
    let program = bulkhead_tests::env::built("sandboxer")?;
    if let Some(pods) = soak {
        let io = ios.first().copied().unwrap_or(IoType::Fifo);
        let mut node = Node::start(&program, &["busybox"], io)?;
        basic::come_and_go(&mut node, &handler, pods)?;
        println!("{pods} pods came and went; nothing is left");
        return Ok(true);
    }
    // Once for each way of streams, and once more in processes.
    let mut rounds: Vec<(IoType, Isolation)> = ios
        .iter()
        .map(|io| (*io, isolation.unwrap_or(Isolation::Thread)))
        .collect();
    if isolation.is_none() && handler == OURS && filters.is_empty() {
        rounds.extend(ios.last().map(|io| (*io, Isolation::Process)));
    }
    let (mut passed, mut failed) = (0, Vec::new());
    for (number, (io, place)) in rounds.iter().enumerate() {
        let of_workers = |name: &str| worker::TESTS.iter().any(|t| t.0 == name);
        let tests: Vec<_> = all
            .iter()
            .filter(|t| *place == Isolation::Process || !of_workers(t.0))
            .filter(|t| {
                // What does not depend on it needs no second time.
                number == 0
                    || !filters.is_empty()
                    || match place {
                        Isolation::Thread => STREAMS.contains(&t.0),
                        Isolation::Process => ISOLATED.contains(&t.0),
                    }
            })
            .collect();
        println!(
            "running {} tests ({handler}, {io:?}, {place:?})",
            tests.len()
        );
        let mut node = Node::start_isolated(*place, &program, &["busybox", "python3"], *io)?;
        for (name, _, test) in tests {
            let begin = Instant::now();
            let result = test(&mut node, &handler);
            let seconds = begin.elapsed().as_secs_f64();
            match result {
                Ok(()) => {
                    println!("test {io:?}::{place:?}::{name} ... ok ({seconds:.1} s)");
                    passed += 1;
                }
                Err(error) => {
                    println!(
                        "test {io:?}::{place:?}::{name} ... FAILED ({seconds:.1} s)\n{error:#}\n{}",
                        node.logs()
                    );
                    failed.push(format!("{io:?}::{place:?}::{name}"));
                    // The next one is not to suffer for it.
                    node.ensure_running()?;
                }
            }
        }
        drop(node);
    }
    for name in &failed {
        println!("failed: {name}");
    }
    let word = if failed.is_empty() { "ok" } else { "FAILED" };
    println!(
        "test result: {word}. {passed} passed; {} failed; 0 ignored; 0 measured; 0 filtered out",
        failed.len()
    );
    Ok(failed.is_empty())
}

/// Runs a command beside a node of ours: containerd is at its usual place, what else there is in the
/// directory that [`Node::DIRECTORY`] names. At the end its logs are shown, where anything failed.
fn run_suite(handler: &str, ios: &[IoType], command: &[String]) -> Result<bool> {
    let [program, args @ ..] = command else {
        bail!("--run: no command");
    };
    let sandboxer = bulkhead_tests::env::built("sandboxer")?;
    let io = ios.first().copied().unwrap_or(IoType::Fifo);
    let node = Node::start_for(Purpose::Suite(handler), &sandboxer, &[], io)?;
    let (variable, directory) = Node::DIRECTORY;
    let status = Command::new(program)
        .args(args)
        .env(variable, directory)
        .status()
        .with_context(|| program.clone())?;
    if !status.success() {
        println!("{}", node.logs());
    }
    Ok(status.success())
}
