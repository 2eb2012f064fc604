//! Fuzzing without a fuzzing engine: seeds are mutated at random (not guided by coverage) and fed
//! to what reads bytes of others (`src/fuzz/`). `fuzz list`, `fuzz TARGET SECONDS`,
//! `fuzz TARGET --replay FILE`. One target is played in a VM and needs KVM: `fuzz appkernel SECONDS`,
//! random system calls on the app kernel (`FUZZ_SEED`, and `FUZZ_ROUNDS=FIRST+COUNT` to play some of
//! its rounds again).
//!
//! An input that makes a target panic (on any thread, also where the panic is caught), or that takes
//! longer than [`PATIENCE`], is written to `target/fuzz/TARGET-HASH` and named.

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use bulkhead_tests::calls::{self, Length};
use bulkhead_tests::fuzz::{TARGETS, Target, hex};

/// xorshift64*: repeatable, which a finding must be.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }

    fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit.max(1) as u64) as usize
    }
}

/// Changes `input` in a few places, or makes it anew.
fn mutate(input: &mut Vec<u8>, longest: usize, random: &mut Random) {
    const EDGES: [u64; 9] = [
        0,
        1,
        0x7F,
        0xFF,
        0x7FFF,
        0xFFFF,
        0x7FFF_FFFF,
        0xFFFF_FFFF,
        u64::MAX,
    ];
    for _ in 0..=random.below(6) {
        match random.below(8) {
            0 => {
                let len = random.below(longest);
                input.clear();
                input.extend(std::iter::repeat_with(|| random.next() as u8).take(len));
            }
            1 => input.truncate(random.below(input.len() + 1)),
            2 => {
                let len = random.below(64);
                input.extend(std::iter::repeat_with(|| random.next() as u8).take(len));
            }
            3 => {
                let (from, len) = (random.below(input.len()), random.below(32));
                let copy: Vec<u8> = input.iter().skip(from).take(len).copied().collect();
                let at = random.below(input.len() + 1);
                input.splice(at..at, copy);
            }
            4 if !input.is_empty() => {
                let value = EDGES[random.below(EDGES.len())].to_le_bytes();
                let width = 1 << random.below(4);
                let at = random.below(input.len());
                for (slot, byte) in input.iter_mut().skip(at).zip(&value[..width]) {
                    *slot = *byte;
                }
            }
            5 if !input.is_empty() => {
                let at = random.below(input.len());
                input.remove(at);
            }
            _ if !input.is_empty() => {
                let at = random.below(input.len());
                input[at] ^= 1 << random.below(8);
            }
            _ => input.push(random.next() as u8),
        }
    }
    input.truncate(longest);
}

/// Longest time for one input.
const PATIENCE: Duration = Duration::from_secs(20);
/// Most memory, in KiB, that a target may ever have had.
const MEMORY_KIB: u64 = 2 << 20;

/// Panics so far, on any thread, and what the last one said.
static PANICS: AtomicU64 = AtomicU64::new(0);
static LAST_PANIC: Mutex<String> = Mutex::new(String::new());
/// The input under way, and when it began.
static UNDER_WAY: Mutex<Option<(Vec<u8>, Instant)>> = Mutex::new(None);

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Keeps the input and says what is wrong with it.
fn report(target: &Target, out: &Path, input: &[u8], what: &str) -> Result<()> {
    fs::create_dir_all(out)?;
    let path = out.join(format!("{}-{}", target.name, &hex(input)[..16]));
    fs::write(&path, input)?;
    println!("{}: FINDING: {what}", target.name);
    println!("replay: fuzz {} --replay {}", target.name, path.display());
    Ok(())
}

/// Ends the process when one input takes too long.
fn watch(target: &'static Target, out: PathBuf) {
    std::thread::spawn(move || {
        loop {
            std::thread::sleep(Duration::from_secs(1));
            let under_way = lock(&UNDER_WAY);
            let Some((input, _)) = under_way.as_ref().filter(|u| u.1.elapsed() > PATIENCE) else {
                continue;
            };
            let what = format!("it takes longer than {} s", PATIENCE.as_secs());
            let _ = report(target, &out, input, &what);
            std::process::exit(1);
        }
    });
}

/// The most memory this process ever had, in KiB.
fn peak_kib() -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|l| l.starts_with("VmHWM:"))?;
    line.split_whitespace().nth(1)?.parse().ok()
}

fn fuzz(target: &'static Target, length: Duration, out: &Path) -> Result<ExitCode> {
    // The seed of the day: repeatable by hand, different from run to run.
    let seed = std::env::var("FUZZ_SEED").ok().and_then(|s| s.parse().ok());
    let seed: u64 = seed.unwrap_or_else(|| u64::from(std::process::id()) << 32 | 0x9E37_79B9);
    let mut random = Random(seed | 1);
    let mut pool = (target.seeds)();
    let start = Instant::now();
    let mut runs: u64 = 0;
    watch(target, out.to_owned());
    while start.elapsed() < length {
        let mut input = pool[random.below(pool.len())].clone();
        mutate(&mut input, target.longest, &mut random);
        runs += 1;
        *lock(&UNDER_WAY) = Some((input.clone(), Instant::now()));
        let result = catch_unwind(AssertUnwindSafe(|| (target.run)(&input)));
        *lock(&UNDER_WAY) = None;
        let peak = runs.is_multiple_of(1024).then(peak_kib).flatten();
        let peak = peak.filter(|peak| *peak > MEMORY_KIB);
        let finding = match peak {
            _ if result.is_err() || PANICS.load(Ordering::Relaxed) > 0 => {
                Some(format!("panic: {}", lock(&LAST_PANIC)))
            }
            Some(peak) => Some(format!("{peak} KiB of memory after {runs} inputs")),
            None => None,
        };
        if let Some(what) = finding {
            report(target, out, &input, &what)?;
            return Ok(ExitCode::FAILURE);
        }
        // Without coverage nothing tells a better input from a worse: keep a drifting few.
        if pool.len() < 64 {
            pool.push(input);
        } else if random.below(16) == 0 {
            let at = random.below(pool.len());
            pool[at] = if random.below(4) == 0 {
                let seeds = (target.seeds)();
                seeds[random.below(seeds.len())].clone()
            } else {
                input
            };
        }
    }
    let seconds = start.elapsed().as_secs_f64();
    println!(
        "{}: {runs} inputs in {seconds:.0} s ({:.0}/s), no finding (seed {seed})",
        target.name,
        runs as f64 / seconds
    );
    Ok(ExitCode::SUCCESS)
}

/// Random system calls in the app kernel's VM. The last line is as the tests' programs have it, for
/// the one who counts.
fn appkernel(seconds: u64) -> Result<ExitCode> {
    let variable = |name| std::env::var(name).ok();
    let seed = variable("FUZZ_SEED").and_then(|s| s.parse().ok());
    let seed: u64 = seed.unwrap_or_else(|| u64::from(std::process::id()) << 20 | 0x9E37);
    let rounds = variable("FUZZ_ROUNDS");
    let rounds = rounds.as_deref().and_then(|r| r.split_once('+'));
    let length = match rounds {
        Some((first, count)) => Length::Rounds(first.parse()?, count.parse()?),
        None => Length::Seconds(seconds),
    };
    let played = calls::play(seed, length);
    let (word, passed) = match &played {
        Ok(count) => {
            println!("appkernel: {count} rounds, no finding (seed {seed})");
            ("ok", 1)
        }
        Err(finding) => {
            println!("appkernel: FINDING: {finding:#}");
            ("FAILED", 0)
        }
    };
    println!(
        "test result: {word}. {passed} passed; {} failed; 0 ignored",
        1 - passed
    );
    Ok(if passed == 1 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn main() -> Result<ExitCode> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let name = args.first().context("usage: fuzz list | TARGET SECONDS")?;
    if name == "list" {
        TARGETS
            .iter()
            .for_each(|target| println!("{}", target.name));
        return Ok(ExitCode::SUCCESS);
    }
    if name == "appkernel" {
        return appkernel(args.get(1).map_or(Ok(60), |s| s.parse())?);
    }
    let Some(target) = TARGETS.iter().find(|target| target.name == name) else {
        bail!("there is no target {name}: `fuzz list` names them");
    };
    std::panic::set_hook(Box::new(|info| {
        *lock(&LAST_PANIC) = info.to_string();
        PANICS.fetch_add(1, Ordering::Relaxed);
    }));
    if args.get(1).is_some_and(|arg| arg == "--replay") {
        let input = fs::read(args.get(2).context("--replay FILE")?)?;
        let result = catch_unwind(AssertUnwindSafe(|| (target.run)(&input)));
        if result.is_err() || PANICS.load(Ordering::Relaxed) > 0 {
            println!("{name}: FINDING: panic: {}", lock(&LAST_PANIC));
            return Ok(ExitCode::FAILURE);
        }
        println!("{name}: survived");
        return Ok(ExitCode::SUCCESS);
    }
    let seconds = args.get(1).map_or(Ok(60), |s| s.parse())?;
    let out = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| "target".into(), PathBuf::from);
    fuzz(target, Duration::from_secs(seconds), &out.join("fuzz"))
}
