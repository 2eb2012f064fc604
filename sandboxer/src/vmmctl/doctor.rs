//! `vmmctl doctor`: what this host has and lacks, and what to do about it.

use std::path::Path;
use std::process::Command;

use bulkhead_vmm::kvm_check;
use bulkhead_vmm::kvm_check::Probe;
use nix::sys::resource::{Resource, getrlimit};
use serde::Serialize;

use super::error::CliError;
use super::{Context, print, print_json};
use crate::engine::microvm::files::GuestFiles;

/// Check what this host has and lacks.
#[derive(Debug, clap::Args)]
#[command(after_help = "Exit code 0 when microVMs can run here, 1 when not.")]
pub struct Args {}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Verdict {
    Good,
    Limited,
    Bad,
}

#[derive(Debug, Serialize)]
struct Check {
    name: &'static str,
    verdict: Verdict,
    found: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    remedy: String,
}

impl Check {
    fn good(name: &'static str, found: impl Into<String>) -> Self {
        Self {
            name,
            verdict: Verdict::Good,
            found: found.into(),
            remedy: String::new(),
        }
    }

    fn limited(name: &'static str, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self {
            name,
            verdict: Verdict::Limited,
            found: found.into(),
            remedy: remedy.into(),
        }
    }

    fn bad(name: &'static str, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self {
            name,
            verdict: Verdict::Bad,
            found: found.into(),
            remedy: remedy.into(),
        }
    }
}

/// Runs the command.
pub fn run(_args: &Args, context: &Context) -> Result<u8, CliError> {
    let checks = [
        kvm(),
        guest_files(),
        cgroups(),
        open_files(),
        mappings(),
        privileges(),
        tun(),
        vhost_net(),
        containerd(),
    ];
    let usable = checks.iter().all(|c| c.verdict != Verdict::Bad);
    if context.json {
        print_json(&serde_json::json!({"usable": usable, "checks": checks}))?;
    } else {
        print(&render(&checks, super::terminal::colour_stdout()))?;
    }
    Ok(u8::from(!usable))
}

fn render(checks: &[Check], colour: bool) -> String {
    let width = checks
        .iter()
        .map(|c| c.name.chars().count())
        .max()
        .unwrap_or(0);
    let mut out = String::new();
    for check in checks {
        let (sign, paint) = match check.verdict {
            Verdict::Good => ("✓", "\x1b[32m"),
            Verdict::Limited => ("!", "\x1b[33m"),
            Verdict::Bad => ("✗", "\x1b[31m"),
        };
        let sign = if colour {
            format!("{paint}{sign}\x1b[0m")
        } else {
            sign.to_owned()
        };
        out.push_str(&format!("{:<width$} {sign} {}\n", check.name, check.found));
        if !check.remedy.is_empty() {
            out.push_str(&format!("{:<width$}   → {}\n", "", check.remedy));
        }
    }
    out
}

fn kvm() -> Check {
    let report = kvm_check(Probe::Measured);
    let speed = report
        .instructions_per_second
        .map_or_else(String::new, |n| {
            format!("; {:.0} million instructions/s", n / 1e6)
        });
    if report.usable() {
        return Check::good("KVM", format!("{}{speed}", report.detail));
    }
    // The detail ends in the remedy.
    Check::bad("KVM", report.detail, "")
}

fn guest_files() -> Check {
    match GuestFiles::find(None, None) {
        Ok(files) => Check::good(
            "guest",
            format!(
                "kernel {}, image {}",
                files.kernel.display(),
                files.image.display()
            ),
        ),
        Err(e) => Check::bad(
            "guest",
            e.to_string(),
            "install the guest files, or build them: ./dev kernel rootfs",
        ),
    }
}

fn cgroups() -> Check {
    match std::fs::read_to_string("/sys/fs/cgroup/cgroup.controllers") {
        Ok(list) => {
            let missing: Vec<&str> = ["cpu", "memory", "pids"]
                .into_iter()
                .filter(|c| !list.split_whitespace().any(|have| have == *c))
                .collect();
            if missing.is_empty() {
                return Check::good("cgroups", "v2 with cpu, memory and pids");
            }
            Check::limited(
                "cgroups",
                format!("v2 without {}", missing.join(", ")),
                "enable the controllers in the parent's cgroup.subtree_control",
            )
        }
        Err(_) => Check::limited(
            "cgroups",
            "v1 or hybrid: CPU and memory of pods are limited by their VMs only",
            "boot with systemd.unified_cgroup_hierarchy=1",
        ),
    }
}

fn open_files() -> Check {
    match getrlimit(Resource::RLIMIT_NOFILE) {
        Ok((_, hard)) if hard >= 1 << 19 => Check::good("NOFILE", format!("hard limit {hard}")),
        Ok((_, hard)) => Check::limited(
            "NOFILE",
            // About 130 descriptors for an overlay root in use and the VM's own.
            format!(
                "hard limit {hard}: about {} pods with overlay roots",
                hard / 130
            ),
            "LimitNOFILE=1048576 in the unit, or ulimit -Hn 1048576",
        ),
        Err(e) => Check::limited("NOFILE", e.desc(), ""),
    }
}

fn mappings() -> Check {
    let number = std::fs::read_to_string("/proc/sys/vm/max_map_count")
        .ok()
        .and_then(|t| t.trim().parse::<u64>().ok());
    match number {
        Some(n) if n >= 262_144 => Check::good("mappings", format!("vm.max_map_count {n}")),
        Some(n) => Check::limited(
            "mappings",
            format!(
                "vm.max_map_count {n}: enough for about {} VMs in one process",
                n / 100
            ),
            "sysctl -w vm.max_map_count=1048576",
        ),
        None => Check::limited("mappings", "vm.max_map_count cannot be read", ""),
    }
}

fn privileges() -> Check {
    if nix::unistd::geteuid().is_root() {
        return Check::good("root", "yes: container roots are overlays");
    }
    Check::limited(
        "root",
        "no: container roots are copied, files belong to you, no tap devices",
        "run as root where that matters",
    )
}

fn tun() -> Check {
    if Path::new("/dev/net/tun").exists() {
        return Check::good("tun", "/dev/net/tun");
    }
    Check::limited(
        "tun",
        "/dev/net/tun is missing: no networks but none",
        "modprobe tun",
    )
}

fn vhost_net() -> Check {
    if Path::new("/dev/vhost-net").exists() {
        return Check::good("vhost-net", "/dev/vhost-net");
    }
    Check::limited(
        "vhost-net",
        "absent (optional: networks work without, at a higher cost)",
        "modprobe vhost_net",
    )
}

fn containerd() -> Check {
    let Ok(output) = Command::new("containerd").arg("--version").output() else {
        return Check::limited("containerd", "not installed (only Kubernetes needs it)", "");
    };
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let version = text
        .split_whitespace()
        .find(|w| {
            w.trim_start_matches('v')
                .starts_with(|c: char| c.is_ascii_digit())
        })
        .unwrap_or("unknown version");
    let version = version.trim_start_matches('v');
    let major: u32 = version
        .split('.')
        .next()
        .and_then(|v| v.parse().ok())
        .unwrap_or(0);
    if major < 2 {
        return Check::limited(
            "containerd",
            format!("{version}: too old for sandboxers"),
            "install containerd 2.1 or newer",
        );
    }
    let running = if Path::new("/run/containerd/containerd.sock").exists() {
        "running"
    } else {
        "not running"
    };
    let configured = std::fs::read_to_string("/etc/containerd/config.toml")
        .is_ok_and(|c| c.contains("bulkhead"));
    let found = format!(
        "{version}, {running}, bulkhead {}",
        if configured {
            "configured"
        } else {
            "not configured"
        }
    );
    if configured {
        Check::good("containerd", found)
    } else {
        Check::limited(
            "containerd",
            found,
            "only Kubernetes needs it; add the proxy plugin to /etc/containerd/config.toml",
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_shortcoming_has_a_line_and_a_remedy() {
        let text = render(
            &[
                Check::good("KVM", "hardware"),
                Check::bad("tun", "missing", "modprobe tun"),
            ],
            false,
        );
        assert_eq!(
            text,
            "KVM ✓ hardware\ntun ✗ missing\n      → modprobe tun\n"
        );
    }
}
