//! `vmmctl setup containerd`: the part of containerd's configuration that makes it know us.

use std::path::{Path, PathBuf};

use super::error::CliError;
use super::{Context, print, print_json};
use crate::fsutil;

/// First and last line of what is ours in somebody else's file.
const BEGIN: &str = "# BEGIN bulkhead (vmmctl setup containerd)";
const END: &str = "# END bulkhead";
/// Largest configuration that is read.
const MAX_FILE: u64 = 4 << 20;

/// A kind of pods: a sandboxer, a runtime and a handler of containerd's, all of one name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Runtime {
    /// Pods in VMs with a Linux guest.
    Microvm,
    /// Pods on the app kernel.
    App,
    /// Pods of WebAssembly programs.
    Wasm,
    /// Pods of ordinary containers, which share the host's kernel.
    Process,
}

impl Runtime {
    fn name(self) -> &'static str {
        match self {
            Self::Microvm => "bulkhead-microvm",
            Self::App => "bulkhead-app",
            Self::Wasm => "bulkhead-wasm",
            Self::Process => "bulkhead-process",
        }
    }

    /// Where the sandboxer serves it by default.
    fn socket(self) -> &'static str {
        match self {
            Self::Microvm => "/run/bulkhead/microvm.sock",
            Self::App => "/run/bulkhead/app.sock",
            Self::Wasm => "/run/bulkhead/wasm.sock",
            Self::Process => "/run/bulkhead/process.sock",
        }
    }

    /// The program that containerd looks for in its PATH.
    fn shim(self) -> String {
        format!("containerd-shim-{}-v1", self.name())
    }
}

/// Make a service of this host know our runtimes.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, clap::Subcommand)]
enum What {
    Containerd(ContainerdArgs),
}

/// Add our runtimes to containerd's configuration, or take them out again.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  vmmctl setup containerd --dry-run          only show what would be added
  vmmctl setup containerd && systemctl restart containerd
  vmmctl setup containerd --runtime microvm --runtime app
  vmmctl setup containerd --undo

What is added stands between two marked lines at the end of the file; nothing else is changed, and
doing it again replaces it. Needs containerd 2.1 or later, started after the sandboxer.")]
struct ContainerdArgs {
    /// containerd's configuration file.
    #[arg(
        long,
        value_name = "FILE",
        default_value = "/etc/containerd/config.toml"
    )]
    config: PathBuf,
    /// Which runtimes; more than once for several [default: all].
    #[arg(long, value_enum, value_name = "RUNTIME")]
    runtime: Vec<Runtime>,
    /// Socket of the sandboxer for the one --runtime [default: as in its configuration].
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// How containers' output reaches containerd.
    #[arg(long, value_enum, default_value_t = IoType::Fifo)]
    io_type: IoType,
    /// Only show it.
    #[arg(long)]
    dry_run: bool,
    /// Take it out.
    #[arg(long, conflicts_with_all = ["runtime", "socket", "io_type"])]
    undo: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum IoType {
    Fifo,
    Streaming,
}

impl ContainerdArgs {
    fn runtimes(&self) -> Vec<Runtime> {
        let all = [
            Runtime::Microvm,
            Runtime::App,
            Runtime::Wasm,
            Runtime::Process,
        ];
        let named = |r: &Runtime| self.runtime.is_empty() || self.runtime.contains(r);
        all.into_iter().filter(named).collect()
    }
}

/// Runs the command.
pub fn run(args: &Args, context: &Context) -> Result<u8, CliError> {
    let What::Containerd(args) = &args.what;
    let before = read(&args.config)?;
    let after = match args.undo {
        true => without(&before),
        false => with(&before, args)?,
    };
    let changed = before != after;
    if args.dry_run {
        match context.json {
            true => print_json(&serde_json::json!({
                "config": args.config, "changed": changed, "text": ours(&after),
            }))?,
            false if args.undo => print(&format!("{}", Removal(&before)))?,
            false => print(&format!("{}\n", ours(&after)))?,
        }
        return Ok(0);
    }
    if changed {
        if let Some(dir) = args.config.parent() {
            std::fs::create_dir_all(dir).map_err(|e| CliError::io(dir.display().to_string(), e))?;
        }
        let mode = mode_of(&args.config);
        fsutil::write_atomically(&args.config, after.as_bytes(), mode)
            .map_err(|e| CliError::io(args.config.display().to_string(), e))?;
    }
    let missing: Vec<String> = args
        .runtimes()
        .into_iter()
        .map(Runtime::shim)
        .filter(|shim| !found_in_path(shim))
        .collect();
    if context.json {
        print_json(&serde_json::json!({
            "config": args.config, "changed": changed, "undo": args.undo,
            "shims_missing": missing,
        }))?;
        return Ok(0);
    }
    let done = match (changed, args.undo) {
        (true, false) => "now knows",
        (true, true) => "does not know any more",
        (false, false) => "knew already, as it should be,",
        (false, true) => "did not know",
    };
    let names: Vec<&str> = args.runtimes().into_iter().map(Runtime::name).collect();
    let names = names.join(", ");
    print(&format!("{}: {done} {names}\n", args.config.display()))?;
    if changed {
        print("restart containerd for it to take effect: systemctl restart containerd\n")?;
    }
    if !args.undo && !missing.is_empty() {
        eprintln!(
            "warning: {}: not in PATH: without it a restart of containerd forgets running \
             containers; put it beside containerd (all are links to one program)",
            missing.join(", ")
        );
    }
    Ok(0)
}

fn read(path: &Path) -> Result<String, CliError> {
    use std::io::Read;
    let mut text = String::new();
    match std::fs::File::open(path) {
        Ok(file) => file
            .take(MAX_FILE)
            .read_to_string(&mut text)
            .map(|_| text)
            .map_err(|e| CliError::io(path.display().to_string(), e)),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(text),
        Err(e) => Err(CliError::io(path.display().to_string(), e)),
    }
}

fn mode_of(path: &Path) -> u32 {
    use std::os::unix::fs::PermissionsExt;
    std::fs::metadata(path).map_or(0o644, |m| m.permissions().mode() & 0o777)
}

/// The file without what is ours.
fn without(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut inside = false;
    for line in text.split_inclusive('\n') {
        match line.trim_end() {
            BEGIN => inside = true,
            END if inside => inside = false,
            _ if inside => {}
            _ => out.push_str(line),
        }
    }
    out
}

/// What is ours in a file.
fn ours(text: &str) -> &str {
    let from = text.find(BEGIN).unwrap_or(text.len());
    text.get(from..).unwrap_or_default().trim_end()
}

/// The file with what is ours, checked.
fn with(before: &str, args: &ContainerdArgs) -> Result<String, CliError> {
    let wrong = |reason: String| {
        CliError::new(
            "containerd-config",
            format!("{}: {reason}", args.config.display()),
        )
    };
    let mut text = without(before);
    if text.trim().is_empty() {
        text = "version = 3\n".to_owned();
    }
    let table: toml::Table = text
        .parse()
        .map_err(|e: toml::de::Error| wrong(format!("is not TOML: {}", e.message())))?;
    let plugin = match table.get("version").and_then(toml::Value::as_integer) {
        Some(3) => "io.containerd.cri.v1.runtime",
        Some(2) => "io.containerd.grpc.v1.cri",
        other => {
            let found = other.map_or("has no version".to_owned(), |v| format!("has version {v}"));
            return Err(wrong(format!(
                "{found}; versions 2 and 3 are known (`containerd config migrate` makes one)"
            )));
        }
    };
    let disabled = table
        .get("disabled_plugins")
        .and_then(toml::Value::as_array)
        .is_some_and(|all| {
            all.iter()
                .filter_map(toml::Value::as_str)
                .any(|p| p == "cri" || p.starts_with("io.containerd.grpc.v1.cri"))
        });
    if disabled {
        return Err(wrong(
            "disabled_plugins turns CRI off: take \"cri\" out of it first".to_owned(),
        ));
    }
    let io_type = match args.io_type {
        IoType::Fifo => "fifo",
        IoType::Streaming => "streaming",
    };
    let runtimes = args.runtimes();
    if args.socket.is_some() && runtimes.len() != 1 {
        return Err(CliError::new(
            "usage",
            "--socket is that of one runtime: name it with --runtime",
        ));
    }
    if !text.ends_with('\n') {
        text.push('\n');
    }
    text.push_str(BEGIN);
    text.push('\n');
    for runtime in runtimes {
        let name = runtime.name();
        let socket = args
            .socket
            .as_deref()
            .unwrap_or(Path::new(runtime.socket()))
            .to_str()
            .filter(|s| s.starts_with('/') && !s.contains(['\'', '\n']))
            .ok_or_else(|| CliError::new("usage", "--socket must be an absolute path"))?;
        text.push_str(&format!(
            "[proxy_plugins.{name}]\n  type = 'sandbox'\n  address = '{socket}'\n\
             [plugins.'{plugin}'.containerd.runtimes.{name}]\n  \
             runtime_type = 'io.containerd.{name}.v1'\n  sandboxer = '{name}'\n  \
             io_type = '{io_type}'\n"
        ));
        if runtime != Runtime::Process {
            text.push_str(
                "  # devices of this host cannot be given to a sandbox\n  \
                 privileged_without_host_devices = true\n",
            );
        }
    }
    text.push_str(END);
    text.push('\n');
    text.parse::<toml::Table>().map_err(|e| {
        wrong(format!(
            "our runtimes cannot be added at its end ({}): one is there already, or written as \
             one inline table",
            e.message()
        ))
    })?;
    Ok(text)
}

/// What an undo would take out.
struct Removal<'a>(&'a str);

impl std::fmt::Display for Removal<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut inside = false;
        for line in self.0.lines() {
            inside |= line.trim_end() == BEGIN;
            if inside {
                writeln!(f, "-{line}")?;
            }
            inside &= line.trim_end() != END;
        }
        Ok(())
    }
}

fn found_in_path(name: &str) -> bool {
    // Where containerd's unit looks, and where we do.
    let ours = std::env::var_os("PATH").unwrap_or_default();
    let standard = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
    std::env::split_paths(&ours)
        .chain(std::env::split_paths(standard))
        .any(|dir| dir.join(name).is_file())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args() -> ContainerdArgs {
        ContainerdArgs {
            config: "/etc/containerd/config.toml".into(),
            runtime: Vec::new(),
            socket: None,
            io_type: IoType::Streaming,
            dry_run: false,
            undo: false,
        }
    }

    fn runtime(text: &str, plugin: &str, name: &str) -> toml::Value {
        let table: toml::Table = text.parse().expect("TOML");
        table["plugins"][plugin]["containerd"]["runtimes"][name].clone()
    }

    #[test]
    fn the_runtime_is_added_replaced_and_taken_out() {
        let debian = "version = 2\n\n[plugins]\n  [plugins.\"io.containerd.grpc.v1.cri\"]\n    \
                      [plugins.\"io.containerd.grpc.v1.cri\".cni]\n      bin_dir = \"/usr/lib/cni\"\n";
        let once = with(debian, &args()).expect("added");
        for name in [
            "bulkhead-microvm",
            "bulkhead-app",
            "bulkhead-wasm",
            "bulkhead-process",
        ] {
            let found = runtime(&once, "io.containerd.grpc.v1.cri", name);
            assert_eq!(found["io_type"].as_str(), Some("streaming"));
            assert_eq!(found["sandboxer"].as_str(), Some(name));
        }
        assert!(once.starts_with(debian), "the rest stays as it was");
        assert_eq!(with(&once, &args()).expect("again"), once);
        assert_eq!(without(&once), debian);
        let fresh = with("", &args()).expect("made");
        runtime(&fresh, "io.containerd.cri.v1.runtime", "bulkhead-microvm");
    }

    #[test]
    fn runtimes_are_chosen() {
        let one = ContainerdArgs {
            runtime: vec![Runtime::App],
            socket: Some("/run/x.sock".into()),
            ..args()
        };
        let text = with("", &one).expect("added");
        assert!(
            text.contains("address = '/run/x.sock'") && !text.contains("wasm"),
            "{text}"
        );
        for socket in ["x.sock", "/a'b"] {
            let wrong = ContainerdArgs {
                runtime: vec![Runtime::App],
                socket: Some(socket.into()),
                ..args()
            };
            assert!(with("", &wrong).is_err(), "{socket}");
        }
        let ambiguous = ContainerdArgs {
            socket: Some("/run/x.sock".into()),
            ..args()
        };
        let error = with("", &ambiguous).expect_err("which").to_string();
        assert!(error.contains("--runtime"), "{error}");
    }

    #[test]
    fn what_cannot_work_is_refused() {
        for (text, word) in [
            ("version = 1\n", "version 1"),
            ("[plugins]\n", "no version"),
            (
                "version = 3\ndisabled_plugins = [\"cri\"]\n",
                "disabled_plugins",
            ),
            ("version = = 3\n", "TOML"),
            (
                "version = 3\n[proxy_plugins.bulkhead-microvm]\ntype = 'sandbox'\n",
                "already",
            ),
        ] {
            let error = with(text, &args()).expect_err(text).to_string();
            assert!(error.contains(word), "{error}");
        }
    }
}
