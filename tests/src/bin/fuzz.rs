//! Fuzzing without a fuzzing engine: seeds are mutated at random (not guided by coverage) and fed
//! to everything that reads bytes of guests or images. `fuzz list`, `fuzz TARGET SECONDS`,
//! `fuzz TARGET --replay FILE`. One target is played in a VM and needs KVM: `fuzz appkernel SECONDS`,
//! random system calls on the app kernel (`FUZZ_SEED`, and `FUZZ_ROUNDS=FIRST+COUNT` to play some of
//! its rounds again).
//!
//! An input that makes a target panic is written to `target/fuzz/TARGET-HASH` and named.

use std::fs;
use std::io::Write;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use bulkhead_devices::fuzzing::{Target as DeviceTarget, drive};
use bulkhead_devices::virtio::fs::fuzz_fs;
use bulkhead_devices::virtio::vsock::fuzz_vsock;
use bulkhead_protocol::frame::Decoder;
use bulkhead_sandboxer::image::{Silent, Store};
use bulkhead_tests::calls::{self, Length};
use sha2::{Digest, Sha256};

struct Target {
    name: &'static str,
    /// Longest input in bytes.
    longest: usize,
    run: fn(&[u8]),
    seeds: fn() -> Vec<Vec<u8>>,
}

fn no_seeds() -> Vec<Vec<u8>> {
    vec![Vec::new(), vec![0; 64], vec![0xFF; 64]]
}

const TARGETS: &[Target] = &[
    device("legacy", |data| drive(DeviceTarget::Legacy, data)),
    device("rng", |data| drive(DeviceTarget::Rng, data)),
    device("blk", |data| drive(DeviceTarget::Blk, data)),
    device("balloon", |data| drive(DeviceTarget::Balloon, data)),
    device("mem", |data| drive(DeviceTarget::Mem, data)),
    device("net", |data| drive(DeviceTarget::Net, data)),
    device("vsock", fuzz_vsock),
    device("fs", fuzz_fs),
    Target {
        name: "ttrpc",
        longest: 4096,
        run: ttrpc,
        seeds: no_seeds,
    },
    Target {
        name: "kernel",
        longest: 8192,
        run: kernel,
        seeds: kernel_seeds,
    },
    Target {
        name: "image",
        longest: 16384,
        run: image,
        seeds: image_seeds,
    },
];

const fn device(name: &'static str, run: fn(&[u8])) -> Target {
    Target {
        name,
        longest: 4096,
        run,
        seeds: no_seeds,
    }
}

/// Frames of the agent protocol, in pieces as a stream delivers them.
fn ttrpc(data: &[u8]) {
    let Some((piece, data)) = data.split_first() else {
        return;
    };
    let mut decoder = Decoder::new(64 << 10);
    for chunk in data.chunks(usize::from(*piece).max(1)) {
        let mut rest = chunk;
        while !rest.is_empty() {
            let before = rest.len();
            if decoder.feed(&mut rest).is_none() && rest.len() == before {
                break;
            }
        }
    }
}

/// A file given as kernel.
fn kernel(data: &[u8]) {
    let Ok(mut file) = tempfile::NamedTempFile::new() else {
        return;
    };
    if file.write_all(data).is_ok() {
        let _ = bulkhead_vmm::boot::try_load(file.path(), 32);
    }
}

fn kernel_seeds() -> Vec<Vec<u8>> {
    let mut bzimage = vec![0; 4096];
    bzimage[0x1F1] = 1;
    bzimage[0x202..0x206].copy_from_slice(b"HdrS");
    bzimage[0x206] = 0x0F;
    bzimage[0x207] = 2;
    bzimage[0x211] = 1;
    vec![
        bulkhead_fixtures::tiny_guest::elf(bulkhead_fixtures::tiny_guest::Kind::Marker),
        bzimage,
    ]
}

/// A file given as image.
fn image(data: &[u8]) {
    let Ok(dir) = tempfile::tempdir() else {
        return;
    };
    let file = dir.path().join("image.tar");
    if fs::write(&file, data).is_err() {
        return;
    }
    if let Ok(store) = Store::open(&dir.path().join("store")) {
        let _ = store.get(&file, &mut Silent);
    }
}

/// A small OCI layout as tar, with one layer.
fn image_seeds() -> Vec<Vec<u8>> {
    let layer = tar(&[("file", b"hello"), ("dir/inner", b"x")]);
    let layer_digest = hex(&layer);
    let config = format!(
        r#"{{"architecture":"amd64","os":"linux","config":{{"Cmd":["/file"]}},"rootfs":{{"type":"layers","diff_ids":["sha256:{layer_digest}"]}}}}"#
    );
    let config_digest = hex(config.as_bytes());
    let manifest = format!(
        r#"{{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","config":{{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"sha256:{config_digest}","size":{}}},"layers":[{{"mediaType":"application/vnd.oci.image.layer.v1.tar","digest":"sha256:{layer_digest}","size":{}}}]}}"#,
        config.len(),
        layer.len()
    );
    let manifest_digest = hex(manifest.as_bytes());
    let index = format!(
        r#"{{"schemaVersion":2,"manifests":[{{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"sha256:{manifest_digest}","size":{}}}]}}"#,
        manifest.len()
    );
    let blob = |digest: &str| format!("blobs/sha256/{digest}");
    vec![
        tar(&[
            ("oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#),
            ("index.json", index.as_bytes()),
            (&blob(&manifest_digest), manifest.as_bytes()),
            (&blob(&config_digest), config.as_bytes()),
            (&blob(&layer_digest), &layer),
        ]),
        tar(&[
            (
                "manifest.json",
                br#"[{"Config":"c.json","RepoTags":["a:b"],"Layers":["l.tar"]}]"#,
            ),
            ("c.json", config.as_bytes()),
            ("l.tar", &layer),
        ]),
    ]
}

fn hex(data: &[u8]) -> String {
    Sha256::digest(data)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

/// A ustar archive.
fn tar(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut out = Vec::new();
    for (name, content) in files {
        let mut header = [0u8; 512];
        header[..name.len()].copy_from_slice(name.as_bytes());
        header[100..107].copy_from_slice(b"0000644");
        header[108..115].copy_from_slice(b"0000000");
        header[116..123].copy_from_slice(b"0000000");
        header[124..135].copy_from_slice(format!("{:011o}", content.len()).as_bytes());
        header[136..147].copy_from_slice(b"00000000000");
        header[148..156].fill(b' ');
        header[156] = b'0';
        header[257..263].copy_from_slice(b"ustar\0");
        header[263..265].copy_from_slice(b"00");
        let sum: u32 = header.iter().map(|b| u32::from(*b)).sum();
        header[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
        out.extend_from_slice(&header);
        out.extend_from_slice(content);
        out.resize(out.len().next_multiple_of(512), 0);
    }
    out.resize(out.len() + 1024, 0);
    out
}

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

fn fuzz(target: &Target, length: Duration, out: &Path) -> Result<ExitCode> {
    // The seed of the day: repeatable by hand, different from run to run.
    let seed = std::env::var("FUZZ_SEED").ok().and_then(|s| s.parse().ok());
    let seed: u64 = seed.unwrap_or_else(|| u64::from(std::process::id()) << 32 | 0x9E37_79B9);
    let mut random = Random(seed | 1);
    let mut pool = (target.seeds)();
    let start = Instant::now();
    let mut runs: u64 = 0;
    std::panic::set_hook(Box::new(|_| {}));
    while start.elapsed() < length {
        let mut input = pool[random.below(pool.len())].clone();
        mutate(&mut input, target.longest, &mut random);
        runs += 1;
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| (target.run)(&input))) {
            let text = panic
                .downcast_ref::<&str>()
                .map(ToString::to_string)
                .or_else(|| panic.downcast_ref::<String>().cloned())
                .unwrap_or_default();
            fs::create_dir_all(out)?;
            let path = out.join(format!("{}-{}", target.name, &hex(&input)[..16]));
            fs::write(&path, &input)?;
            println!("{}: PANIC after {runs} inputs: {text}", target.name);
            println!("replay: fuzz {} --replay {}", target.name, path.display());
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
    if args.get(1).is_some_and(|arg| arg == "--replay") {
        let input = fs::read(args.get(2).context("--replay FILE")?)?;
        (target.run)(&input);
        println!("{name}: survived");
        return Ok(ExitCode::SUCCESS);
    }
    let seconds = args.get(1).map_or(Ok(60), |s| s.parse())?;
    let out = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| "target".into(), PathBuf::from);
    fuzz(target, Duration::from_secs(seconds), &out.join("fuzz"))
}
