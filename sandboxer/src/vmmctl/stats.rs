//! `vmmctl stats`: what a VM does, by its counters.

use std::time::{Duration, Instant};

use serde_json::Value;

use super::error::CliError;
use super::{Context, print, table};
use crate::engine::Sandbox;
use crate::units;

/// Show counters of a VM: exits by reason, memory, bytes per device.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  vmmctl stats a41f
  vmmctl stats a41f --watch
  vmmctl stats a41f --json | jq .kvm_vcpus.exits")]
pub struct Args {
    /// Id or name of the VM.
    id: String,
    /// Once a second, with rates, until Ctrl-C.
    #[arg(short, long)]
    watch: bool,
}

/// Runs the command.
pub fn run(args: &Args, context: &Context) -> Result<u8, CliError> {
    let (_, remote) = context.find(&args.id)?;
    let mut before: Option<(Instant, Value)> = None;
    loop {
        let now = Instant::now();
        let stats = match remote.stats() {
            Ok(stats) => stats,
            // It has ended while we watched.
            Err(_) if before.is_some() => return Ok(0),
            Err(e) => return Err(e.into()),
        };
        if context.json {
            print(&format!("{stats}\n"))?;
        } else {
            let rates = before
                .as_ref()
                .map(|(at, old)| (now.duration_since(*at).as_secs_f64(), old));
            if args.watch && super::terminal::colour_stdout() {
                print("\x1b[H\x1b[J")?;
            }
            print(&show(&stats, rates))?;
        }
        if !args.watch {
            return Ok(0);
        }
        before = Some((now, stats));
        std::thread::sleep(Duration::from_secs(1));
    }
}

fn show(stats: &Value, before: Option<(f64, &Value)>) -> String {
    let rate = |path: &[&str]| -> String {
        let Some((seconds, old)) = before else {
            return String::new();
        };
        let get = |v: &Value| {
            path.iter()
                .fold(v.clone(), |v, key| v[*key].clone())
                .as_f64()
                .unwrap_or(0.0)
        };
        format!(
            "{:.0}",
            (get(stats) - get(old)).max(0.0) / seconds.max(0.001)
        )
    };
    let mut rows = Vec::new();
    if let Some(counters) = stats["kvm_vcpus"].as_object() {
        let mut all: Vec<(&String, u64)> = counters
            .iter()
            .filter_map(|(k, v)| Some((k, v.as_u64()?)))
            .filter(|(_, n)| *n > 0)
            .collect();
        all.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
        for (name, count) in all.into_iter().take(16) {
            rows.push(vec![
                name.clone(),
                count.to_string(),
                rate(&["kvm_vcpus", name]),
            ]);
        }
    }
    let mut out = format!(
        "memory given by the host  {}\n\n",
        units::bytes(stats["memory_resident_bytes"].as_u64().unwrap_or(0))
    );
    out.push_str(&table::render(&["KVM (all vCPUs)", ">COUNT", ">/s"], &rows));
    let mut rows = Vec::new();
    for (index, vcpu) in stats["vcpus"].as_array().into_iter().flatten().enumerate() {
        let cell = |key: &str| vcpu[key].to_string();
        rows.push(vec![
            index.to_string(),
            cell("io_in"),
            cell("io_out"),
            cell("mmio_read"),
            cell("mmio_write"),
            cell("interrupted"),
            cell("other"),
        ]);
    }
    out.push('\n');
    out.push_str(&table::render(
        &[
            "EXITS TO US, vCPU",
            ">port in",
            ">port out",
            ">mmio read",
            ">mmio write",
            ">ours",
            ">other",
        ],
        &rows,
    ));
    if let Some(devices) = stats["devices"].as_object().filter(|d| !d.is_empty()) {
        out.push('\n');
        let rows: Vec<Vec<String>> = devices
            .iter()
            .map(|(name, metrics)| vec![name.clone(), flat(metrics)])
            .collect();
        out.push_str(&table::render(&["DEVICE", "COUNTERS"], &rows));
    }
    out
}

/// `reads 5, bytes 20480`: counters that are not zero.
fn flat(metrics: &Value) -> String {
    let list: Vec<String> = metrics
        .as_object()
        .into_iter()
        .flatten()
        .filter(|(_, v)| v.as_u64().is_some_and(|n| n > 0))
        .map(|(k, v)| format!("{k} {v}"))
        .collect();
    list.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn rates_come_from_two_samples() {
        let old = json!({"kvm_vcpus": {"exits": 100}});
        let new = json!({"kvm_vcpus": {"exits": 300, "zero": 0}, "memory_resident_bytes": 1 << 20, "devices": {"vsock": {"tx": 5, "rx": 0}}});
        let text = show(&new, Some((2.0, &old)));
        assert!(
            text.contains("exits") && text.contains("300  100") && !text.contains("zero"),
            "{text}"
        );
        assert!(text.contains("tx 5") && text.contains("1M"), "{text}");
    }
}
