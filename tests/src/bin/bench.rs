//! `bench boot|fs|appkernel|pods|wasm|wasm-beside …`, `bench wasm-soak COUNT`: see the modules of `bulkhead_tests::bench`.

use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use bulkhead_tests::bench::report::Report;
use bulkhead_tests::bench::{appkernel, boot, fs, pods, wasm, wasm_beside, wasm_soak};

fn main() -> Result<()> {
    let mut args = std::env::args().skip(1);
    let what = args
        .next()
        .context("which benchmark? boot, fs, appkernel, pods or wasm")?;
    match what.as_str() {
        "boot" | "fs" => {
            let mut path = || args.next().map(PathBuf::from);
            let usage = "bench boot|fs VMMCTL KERNEL OUT_DIR [SAMPLES [LINUX_SAMPLES [all]]]";
            let vmmctl = path().context(usage)?;
            let kernel = path().context(usage)?;
            let out = path().context(usage)?;
            let samples = args.next().map_or(Ok(9), |n| n.parse())?;
            let linux = args.next().map_or(Ok(3), |n| n.parse())?;
            let scratch = tempfile::tempdir()?;
            // From a local file system, as an installed program would be: the lab's shared
            // directories are slow, and the peer's program is in the page cache too.
            let local = |path: PathBuf, name: &str| -> Result<PathBuf> {
                let copy = scratch.path().join(name);
                std::fs::copy(&path, &copy).with_context(|| path.display().to_string())?;
                Ok(copy)
            };
            let inputs = boot::Inputs {
                vmmctl: local(vmmctl, "vmmctl")?,
                kernel: local(kernel, "vmlinux")?,
                scratch: scratch.path().into(),
            };
            let report = match what.as_str() {
                "fs" => fs::run(&inputs)?,
                _ => boot::run(&inputs, samples, linux, args.next().is_some())?,
            };
            report.finish(&out)
        }
        "appkernel" => {
            let usage = "bench appkernel VMMCTL PROGRAMS OUT_DIR [PART…]";
            let mut path = || args.next().map(PathBuf::from).context(usage);
            let (vmmctl, programs, out) = (path()?, path()?, path()?);
            let mut parts: Vec<String> = args.collect();
            if parts.is_empty() {
                parts = appkernel::PARTS.map(str::to_owned).into();
            }
            appkernel::run(&vmmctl, &programs, &parts)?.finish(&out)
        }
        "pods" => {
            let usage = "bench pods SANDBOXER OUT_DIR [PART…]";
            let sandboxer = PathBuf::from(args.next().context(usage)?);
            let out = PathBuf::from(args.next().context(usage)?);
            let mut parts: Vec<String> = args.collect();
            if parts.is_empty() {
                parts = pods::PARTS.map(str::to_owned).into();
            }
            pods::run(&sandboxer, &parts)?.finish(&out)
        }
        "wasm" => {
            let out = PathBuf::from(args.next().context("bench wasm OUT_DIR [PART…]")?);
            let mut parts: Vec<String> = args.collect();
            if parts.is_empty() {
                parts = wasm::PARTS.map(str::to_owned).into();
            }
            wasm::run(&parts)?.finish(&out)
        }
        "wasm-beside" => {
            let usage = "bench wasm-beside SANDBOXER OUT_DIR";
            let sandboxer = PathBuf::from(args.next().context(usage)?);
            let out = PathBuf::from(args.next().context(usage)?);
            wasm_beside::run(&sandboxer)?.finish(&out)
        }
        "wasm-soak" => {
            let count = args.next().context("bench wasm-soak COUNT")?.parse()?;
            wasm_soak::soak(count)
        }
        "merge" => {
            let usage = "bench merge NAME OUT_DIR FILE...";
            let name = args.next().context(usage)?;
            let out = PathBuf::from(args.next().context(usage)?);
            let files: Vec<PathBuf> = args.map(PathBuf::from).collect();
            Report::merge(&name, &files)?.finish(&out)
        }
        other => bail!("unknown benchmark {other}"),
    }
}
