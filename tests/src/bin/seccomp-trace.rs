//! What a run has used of the tables of system calls, so that they stay as short as they can be.
//!
//! `seccomp-trace PROGRAM [ARGUMENT…]` runs a program under strace and tells, for each table, which of
//! its calls threads that were held to it have made, which they have not, and which were refused. A
//! thread belongs to a table from the moment on that it loads its filter; which one is told by its
//! name.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader};
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail};
use bulkhead_vmm::seccomp::Table;
use syscalls::Sysno;

/// What a thread of a name is held to, once it has loaded its own filter.
fn role_of(name: &str) -> Option<&'static str> {
    // The kernel shows 15 characters of a name.
    let is = |prefix: &str| name.starts_with(prefix);
    match name {
        _ if is("vcpu") => Some("vcpu"),
        _ if is("dev:") => Some("devices"),
        _ if is("fs:") => Some("files"),
        "wasm-ticker" | "wasm-loader" | "wasm-compiler" | "wasm-sysctl" => None,
        _ if is("wasm-") => Some("wasm program"),
        _ => None,
    }
}

/// One line of strace's: who, and what was called and answered.
struct Line<'a> {
    thread: u32,
    name: &'a str,
    call: &'a str,
    /// With the answer, if it has one.
    rest: &'a str,
    /// The second half of a call that had to wait.
    resumed: bool,
}

fn parse(line: &str) -> Option<Line<'_>> {
    // "123<name> call(arguments) = 0" or "123<name> <... call resumed>) = 0".
    let (thread, rest) = line.split_once('<')?;
    let thread = thread.trim().parse().ok()?;
    let (name, rest) = rest.split_once("> ")?;
    let rest = rest.trim_start();
    if let Some(resumed) = rest.strip_prefix("<... ") {
        let (call, rest) = resumed.split_once(" resumed>")?;
        return Some(Line {
            thread,
            name,
            call,
            rest,
            resumed: true,
        });
    }
    let (call, rest) = rest.split_once('(')?;
    let plain = call.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_');
    plain.then_some(Line {
        thread,
        name,
        call,
        rest,
        resumed: false,
    })
}

/// The thread that a call has made.
fn child_of(rest: &str) -> Option<u32> {
    let (_, answer) = rest.rsplit_once(" = ")?;
    let digits = answer.split(|c: char| !c.is_ascii_digit()).next()?;
    digits.parse().ok()
}

#[derive(Default)]
struct Seen {
    used: BTreeMap<String, u64>,
    refused: BTreeMap<String, u64>,
}

/// What threads did once they were held to a table.
fn read(trace: impl BufRead) -> Result<BTreeMap<&'static str, Seen>> {
    let mut held: BTreeSet<u32> = BTreeSet::new();
    let mut seen: BTreeMap<&'static str, Seen> = BTreeMap::new();
    for line in trace.lines() {
        let line = line?;
        // "123<name> +++ exited with 0 +++": its number may be another's next.
        if line.ends_with("+++") {
            let number = line.split('<').next().and_then(|n| n.trim().parse().ok());
            held.retain(|thread| Some(*thread) != number);
            continue;
        }
        let Some(line) = parse(&line) else { continue };
        let Some(role) = role_of(line.name) else {
            continue;
        };
        if line.call == "seccomp" {
            // Numbers of threads are used again: the last filter counts.
            if line.rest.contains("SECCOMP_SET_MODE_FILTER") || line.resumed {
                held.insert(line.thread);
            }
            continue;
        }
        if !held.contains(&line.thread) {
            continue;
        }
        if let ("clone" | "clone3", Some(child)) = (line.call, child_of(line.rest)) {
            // Filters are inherited.
            held.insert(child);
        }
        let seen = seen.entry(role).or_default();
        // The answer of this one is what the call that was interrupted had.
        let refused = line.rest.contains("EPERM") || line.rest.contains("ENOSYS");
        let of = match refused && line.call != "rt_sigreturn" {
            true => &mut seen.refused,
            false if line.resumed => continue,
            false => &mut seen.used,
        };
        *of.entry(line.call.to_owned()).or_default() += 1;
    }
    Ok(seen)
}

fn name_of(call: libc::c_long) -> String {
    let number = usize::try_from(call).ok().and_then(Sysno::new);
    number.map_or_else(|| call.to_string(), |n| n.name().to_owned())
}

fn print(role: &str, table: &Table, seen: &Seen) {
    let names: BTreeMap<String, &str> = table
        .iter()
        .map(|(call, why)| (name_of(*call), *why))
        .collect();
    let used: Vec<_> = names
        .keys()
        .filter(|n| seen.used.contains_key(*n))
        .collect();
    println!(
        "{role}: {} calls allowed, {} of them used",
        names.len(),
        used.len()
    );
    for name in used {
        println!("  {:>10}  {name}", seen.used.get(name).unwrap_or(&0));
    }
    println!("  not used in this run:");
    for (name, why) in names.iter().filter(|(n, _)| !seen.used.contains_key(*n)) {
        println!("  {:>10}  {name}: {why}", "");
    }
    for (name, count) in &seen.refused {
        println!("  {count:>10}  {name}: refused, or failed with EPERM or ENOSYS");
    }
}

fn run() -> Result<bool> {
    let mut args = std::env::args_os().skip(1);
    let Some(program) = args.next() else {
        bail!("usage: seccomp-trace PROGRAM [ARGUMENT…]");
    };
    let trace = tempfile::NamedTempFile::new()?;
    let status = Command::new("strace")
        .args([
            "--follow-forks",
            "--quiet=attach,personality",
            "--decode-pids=comm",
            "--string-limit=0",
        ])
        .arg("--output")
        .arg(trace.path())
        .arg(program)
        .args(args)
        .status()
        .context("strace (is it installed?)")?;
    let seen = read(BufReader::new(trace.reopen()?))?;
    let wasm: Table = bulkhead_wasm::thread_table().collect();
    let tables = bulkhead_vmm::seccomp::tables();
    let of_threads = tables
        .iter()
        .filter(|(name, _)| !name.starts_with("process"));
    for (name, table) in of_threads.chain([&("wasm program", wasm)]) {
        match seen.get(name) {
            Some(seen) => print(name, table, seen),
            None => println!("{name}: no thread of it was seen"),
        }
    }
    Ok(status.success())
}

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_count_from_the_filter_on() {
        let trace = "\
1<vcpu0:x> openat(AT_FDCWD, \"\"...) = 3
1<vcpu0:x> seccomp(SECCOMP_SET_MODE_FILTER, 0, {len=9, filter=0x1}) = 0
1<vcpu0:x> ioctl(7, KVM_RUN, 0) = 0
2<other> ioctl(7, KVM_RUN, 0) = 0
1<vcpu0:x> futex(0x1 <unfinished ...>
1<vcpu0:x> <... futex resumed>) = 0
1<vcpu0:x> socket(AF_INET, SOCK_DGRAM, 0) = -1 EPERM (Operation not permitted)
1<vcpu0:x> --- SIGSYS {si_signo=SIGSYS} ---
";
        let seen = read(trace.as_bytes()).unwrap();
        let vcpu = seen.get("vcpu").unwrap();
        let used: Vec<_> = vcpu.used.iter().map(|(n, c)| (n.as_str(), *c)).collect();
        assert_eq!(used, [("futex", 1), ("ioctl", 1)]);
        assert_eq!(vcpu.refused.get("socket"), Some(&1));
        assert_eq!(seen.len(), 1);
        assert_eq!(name_of(libc::SYS_openat), "openat");
    }
}
