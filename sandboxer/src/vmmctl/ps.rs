//! `vmmctl ps`: what is running.

use serde_json::{Value, json};

use super::error::CliError;
use super::{Context, print, print_json, table};
use crate::debug::Remote;
use crate::engine::Sandbox;
use crate::rundir;
use crate::units;

/// List VMs.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example: vmmctl ps --json | jq -r '.[].id'")]
pub struct Args {
    /// Also those that are starting or stopping.
    #[arg(short, long)]
    all: bool,
    /// Only ids.
    #[arg(short, long)]
    quiet: bool,
}

/// Runs the command.
pub fn run(args: &Args, context: &Context) -> Result<u8, CliError> {
    let list: Vec<Value> = rundir::list(&context.run_root)
        .into_iter()
        .filter(|vm| vm.alive && (args.all || vm.state.state == "running"))
        .map(|vm| {
            let remote = Remote::new(&vm.state.id, &vm.path);
            let stats = remote.stats().unwrap_or(Value::Null);
            let up = rundir::now_ms().saturating_sub(vm.state.created_ms) / 1000;
            let paused = remote.inspect().is_ok_and(|i| i["state"] == "paused");
            json!({
                "id": vm.state.id,
                "name": vm.state.name,
                "pod": Some(&vm.state.alias).filter(|pod| !pod.is_empty()),
                "kind": vm.state.kind,
                "mode": vm.state.mode,
                "image": vm.state.image,
                "command": vm.state.command,
                "state": if paused { "paused" } else { vm.state.state.as_str() },
                "pid": vm.state.pid,
                "cpus": vm.state.cpus,
                "memory_bytes": vm.state.memory_mib << 20,
                "memory_resident_bytes": stats["memory_resident_bytes"],
                "created_ms": vm.state.created_ms,
                "uptime_seconds": up,
                "exits_per_second": stats["kvm_vcpus"]["exits"].as_u64().map(|n| n / up.max(1)),
            })
        })
        .collect();
    if context.json {
        print_json(&Value::Array(list))?;
        return Ok(0);
    }
    let text = |v: &Value| v.as_str().unwrap_or_default().to_owned();
    if args.quiet {
        print(
            &list
                .iter()
                .map(|vm| text(&vm["id"]) + "\n")
                .collect::<String>(),
        )?;
        return Ok(0);
    }
    let rows: Vec<Vec<String>> = list
        .iter()
        .map(|vm| {
            let used = vm["memory_resident_bytes"]
                .as_u64()
                .map_or_else(|| "?".to_owned(), units::bytes);
            vec![
                text(&vm["id"]),
                text(&vm["name"]),
                text(&vm["kind"]),
                text(&vm["image"]),
                text(&vm["state"]),
                vm["cpus"].to_string(),
                format!(
                    "{used}/{}",
                    units::bytes(vm["memory_bytes"].as_u64().unwrap_or(0))
                ),
                units::uptime(vm["uptime_seconds"].as_u64().unwrap_or(0)),
                vm["exits_per_second"]
                    .as_u64()
                    .map_or_else(|| "?".to_owned(), |n| n.to_string()),
            ]
        })
        .collect();
    print(&table::render(
        &[
            "ID",
            "NAME",
            "KIND",
            "IMAGE",
            "STATE",
            ">CPUS",
            ">MEM (used/max)",
            ">UP",
            ">EXITS/s",
        ],
        &rows,
    ))?;
    Ok(0)
}
