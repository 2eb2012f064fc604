//! Stock containerd, by CRI, with our daemon as its sandbox plugin: every test runs as a user of
//! Kubernetes would have it, and the tests of plain pods run against runc too, to know that the
//! tests themselves are right.
//!
//! usage: cri [--handler HANDLER] [--io fifo|streaming] [FILTER...]

use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Result, bail};
use bulkhead_tests::cri::containerd::{IoType, Node, OURS};

#[path = "cri/basic.rs"]
mod basic;
#[path = "cri/recovery.rs"]
mod recovery;
#[path = "cri/validation.rs"]
mod validation;
#[path = "cri/wide.rs"]
mod wide;

/// A test: its name, whether runc can do it too, and what it does.
type Test = (&'static str, bool, fn(&mut Node, &str) -> Result<()>);

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
    let (mut handler, mut io, mut filters) = (OURS.to_owned(), IoType::Fifo, Vec::new());
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "--handler" => handler = args.next().unwrap_or_default(),
            "--io" => match args.next().as_deref() {
                Some("fifo") => io = IoType::Fifo,
                Some("streaming") => io = IoType::Streaming,
                other => bail!("--io {other:?}: fifo or streaming"),
            },
            _ => filters.push(arg),
        }
    }
    let all = [
        basic::TESTS,
        wide::TESTS,
        validation::TESTS,
        recovery::TESTS,
    ];
    let tests: Vec<&Test> = all
        .into_iter()
        .flatten()
        .filter(|t| handler == OURS || t.1)
        .filter(|t| filters.is_empty() || filters.iter().any(|f| t.0.contains(f.as_str())))
        .collect();
    println!("running {} tests ({handler}, {io:?})", tests.len());
    let program = bulkhead_tests::env::built("sandboxer")?;
    let mut node = Node::start(&program, &["busybox", "python3"], io)?;
    let (mut passed, mut failed) = (0, Vec::new());
    for (name, _, test) in tests {
        let begin = Instant::now();
        let result = test(&mut node, &handler);
        let seconds = begin.elapsed().as_secs_f64();
        match result {
            Ok(()) => {
                println!("test {name} ... ok ({seconds:.1} s)");
                passed += 1;
            }
            Err(error) => {
                println!(
                    "test {name} ... FAILED ({seconds:.1} s)\n{error:#}\n{}",
                    node.logs()
                );
                failed.push(*name);
            }
        }
    }
    drop(node);
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
