//! The daemon's configuration file (TOML). Every key has a default; a key nobody knows is an
//! error, named with its line.

use std::path::{Path, PathBuf};

use serde::Deserialize;

/// Where the file is looked for when none is named.
pub const DEFAULT_PATH: &str = "/etc/bulkhead/sandboxer.toml";

/// The configuration.
#[derive(Debug, Clone, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Where sockets and state of running pods are; must not survive a reboot.
    pub run_dir: PathBuf,
    /// Socket of the sandbox controller; `address` in containerd's `[proxy_plugins]`.
    pub socket: PathBuf,
    /// containerd's ttrpc socket, to which events are sent.
    pub containerd_ttrpc: PathBuf,
    /// `[log]`
    pub log: Log,
    /// `[microvm]`
    pub microvm: Microvm,
    /// `[app]`
    pub app: App,
    /// `[wasm]`
    pub wasm: Wasm,
    /// `[process]`
    pub process: Process,
    /// `[metrics]`
    pub metrics: Metrics,
}

/// Figures for Prometheus.
#[derive(Debug, Clone, Default, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields, default)]
pub struct Metrics {
    /// `unix:/path` or a loopback address with a port; empty: no figures are served.
    pub listen: String,
}

/// Where figures are served.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Listen {
    /// A socket for root.
    Unix(PathBuf),
    /// TCP, on this host only: pods' names are nobody else's business.
    Loopback(std::net::SocketAddr),
}

impl Metrics {
    /// Where they are served, if they are.
    ///
    /// # Errors
    /// What is wrong with the value.
    pub fn parse(&self) -> Result<Option<Listen>, &'static str> {
        if self.listen.is_empty() {
            return Ok(None);
        }
        if let Some(path) = self.listen.strip_prefix("unix:") {
            return match Path::new(path).is_absolute() && path.len() < 108 {
                true => Ok(Some(Listen::Unix(path.into()))),
                false => Err("the socket's path must be absolute and shorter than 108 bytes"),
            };
        }
        match self.listen.parse::<std::net::SocketAddr>() {
            Ok(address) if address.ip().is_loopback() => Ok(Some(Listen::Loopback(address))),
            Ok(_) => Err("must be an address of this host's loopback, as in 127.0.0.1:9469"),
            Err(_) => Err("must be unix:/path or an address and port, as in 127.0.0.1:9469"),
        }
    }
}

/// What is logged.
#[derive(Debug, Clone, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields, default)]
pub struct Log {
    /// `error`, `warn`, `info`, `debug` or `trace`, or a filter as for `RUST_LOG`.
    pub level: String,
}

/// What separates a sandbox from the daemon and from other sandboxes, beside its own wall.
#[derive(Debug, Clone, Copy, Default, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub enum Isolation {
    /// Nothing: it runs on threads of the daemon.
    #[default]
    Thread,
    /// A jailed process of its own.
    Process,
}

/// Pods in VMs with a Linux guest.
#[derive(Debug, Clone, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields, default)]
pub struct Microvm {
    /// `thread` or `process`.
    pub isolation: Isolation,
    /// Guest kernel; found where it is installed if left out.
    pub kernel: Option<PathBuf>,
    /// Guest image; found where it is installed if left out.
    pub image: Option<PathBuf>,
    /// Appended to the guest kernel's command line.
    pub cmdline: String,
    /// vCPUs of a pod that has no CPU limit.
    pub default_cpus: u8,
    /// Most vCPUs of a pod.
    pub max_cpus: u8,
    /// vCPUs that a pod can be given while it runs, beyond those that it starts with.
    pub grow_cpus: u8,
    /// Memory of a pod that has no memory limit, in MiB.
    pub default_memory_mib: u64,
    /// Added to the limit of a pod that has one, for the guest's kernel and agent, in MiB.
    pub overhead_mib: u64,
    /// Most memory of a pod, in MiB.
    pub max_memory_mib: u64,
    /// Memory that a pod can be given while it runs, beyond what it starts with, in MiB.
    pub grow_memory_mib: u64,
    /// Block devices, and images as disks, that containers of one pod can be given.
    pub disk_slots: u8,
    /// Back guest memory with huge pages of the host.
    pub hugepages: bool,
    /// Let the host's kernel move packets between a pod's network and its VM, where it can.
    pub vhost_net: bool,
    /// Let packets be larger than the MTU, and without checksums, between guest and host.
    pub net_offload: bool,
    /// Most shapes of VMs of which one is kept, booted, for pods to start as copies of it.
    pub templates: u8,
    /// Run where KVM is emulated and a boot takes minutes.
    pub allow_emulated_kvm: bool,
}

/// Pods in VMs with the app kernel.
#[derive(Debug, Clone, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields, default)]
pub struct App {
    /// `thread` or `process`.
    pub isolation: Isolation,
    /// Socket of their sandbox controller.
    pub socket: PathBuf,
    /// The app kernel; found where it is installed if left out.
    pub kernel: Option<PathBuf>,
    /// Appended to its command line.
    pub cmdline: String,
    /// Memory of a pod that has no memory limit, in MiB.
    pub default_memory_mib: u64,
    /// Added to the limit of a pod that has one, for the kernel, in MiB.
    pub overhead_mib: u64,
    /// Most memory of a pod, in MiB.
    pub max_memory_mib: u64,
    /// Run where KVM is emulated and a boot takes minutes.
    pub allow_emulated_kvm: bool,
}

/// Pods of WebAssembly programs.
#[derive(Debug, Clone, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields, default)]
pub struct Wasm {
    /// `thread` or `process`.
    pub isolation: Isolation,
    /// Socket of their sandbox controller.
    pub socket: PathBuf,
    /// Where compiled programs are kept; must be ours alone.
    pub cache_dir: PathBuf,
    /// Most that is kept there, in MiB.
    pub cache_mib: u64,
    /// Largest program, in MiB.
    pub max_module_mib: u64,
    /// Most memory that compiling one program may take, in MiB. Programs whose functions cannot be
    /// inlined with that are compiled without, and run slower.
    pub compile_memory_mib: u64,
    /// Inline functions when programs are compiled. Backtraces leave out the frames of those.
    pub inlining: bool,
    /// Most instances at one time in all pods; each reserves about 4 GiB of address space.
    pub max_instances: u32,
}

/// Pods of ordinary containers.
#[derive(Debug, Clone, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields, default)]
pub struct Process {
    /// Socket of their sandbox controller.
    pub socket: PathBuf,
    /// The agent that makes their containers; found where it is installed if left out.
    pub agent: Option<PathBuf>,
}

impl Default for Process {
    fn default() -> Self {
        Self {
            socket: "/run/bulkhead/process.sock".into(),
            agent: None,
        }
    }
}

impl Default for Config {
    fn default() -> Self {
        Self {
            run_dir: "/run/bulkhead".into(),
            socket: "/run/bulkhead/microvm.sock".into(),
            containerd_ttrpc: "/run/containerd/containerd.sock.ttrpc".into(),
            log: Log::default(),
            microvm: Microvm::default(),
            app: App::default(),
            wasm: Wasm::default(),
            process: Process::default(),
            metrics: Metrics::default(),
        }
    }
}

impl Default for App {
    fn default() -> Self {
        Self {
            isolation: Isolation::Thread,
            socket: "/run/bulkhead/app.sock".into(),
            kernel: None,
            cmdline: String::new(),
            default_memory_mib: 128,
            overhead_mib: 16,
            max_memory_mib: 3072,
            allow_emulated_kvm: false,
        }
    }
}

impl Default for Wasm {
    fn default() -> Self {
        Self {
            isolation: Isolation::Thread,
            socket: "/run/bulkhead/wasm.sock".into(),
            cache_dir: "/var/lib/bulkhead/wasm-code".into(),
            cache_mib: 2048,
            max_module_mib: 100,
            compile_memory_mib: 4096,
            inlining: true,
            max_instances: 4000,
        }
    }
}

impl Default for Log {
    fn default() -> Self {
        Self {
            level: "info".into(),
        }
    }
}

impl Default for Microvm {
    fn default() -> Self {
        Self {
            isolation: Isolation::Thread,
            kernel: None,
            image: None,
            cmdline: String::new(),
            default_cpus: 1,
            max_cpus: 32,
            grow_cpus: 1,
            default_memory_mib: 256,
            overhead_mib: 64,
            max_memory_mib: 65_536,
            grow_memory_mib: 1024,
            disk_slots: 4,
            hugepages: false,
            vhost_net: false,
            net_offload: true,
            templates: 4,
            allow_emulated_kvm: false,
        }
    }
}

/// Why a configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("configuration {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The host's answer.
        #[source]
        source: std::io::Error,
    },
    /// The file is not what it should be.
    #[error("configuration {}, line {line}: {reason}", path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// Where.
        line: usize,
        /// What is wrong.
        reason: String,
    },
    /// A value cannot be.
    #[error("configuration {}{}: {key}: {reason}", path.display(), Line(*line))]
    Value {
        /// The file.
        path: PathBuf,
        /// Where; `None`: the key is not in the file, its default does not fit to others.
        line: Option<usize>,
        /// The key.
        key: &'static str,
        /// What is wrong.
        reason: String,
    },
}

/// A line, if it is known, for a message.
struct Line(Option<usize>);

impl std::fmt::Display for Line {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0 {
            Some(line) => write!(f, ", line {line}"),
            None => Ok(()),
        }
    }
}

/// The line of `section.name` in a file that has been parsed without an error.
fn line_of(text: &str, key: &str) -> Option<usize> {
    let (section, name) = key.rsplit_once('.').unwrap_or(("", key));
    let mut current = "";
    for (number, line) in text.lines().enumerate() {
        let line = line.trim();
        if let Some(header) = line.strip_prefix('[') {
            current = header.split(']').next().unwrap_or_default().trim();
        } else if current == section
            && line
                .strip_prefix(name)
                .is_some_and(|rest| rest.trim_start().starts_with('='))
        {
            return Some(number + 1);
        }
    }
    None
}

impl Config {
    /// Reads the file that is named; or the default one, if it is there.
    ///
    /// # Errors
    /// It cannot be read, or is wrong.
    pub fn load(path: Option<&Path>) -> Result<Self, ConfigError> {
        let named = path.is_some();
        let path = path.unwrap_or(Path::new(DEFAULT_PATH));
        let config = match std::fs::read_to_string(path) {
            Ok(text) => Self::read(&text, path)?,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound && !named => Self::default(),
            Err(source) => {
                return Err(ConfigError::Read {
                    path: path.to_owned(),
                    source,
                });
            }
        };
        Ok(config)
    }

    /// Reads a file's text; `path` is for messages.
    ///
    /// # Errors
    /// It is wrong.
    pub fn read(text: &str, path: &Path) -> Result<Self, ConfigError> {
        let config = Self::parse(text, path)?;
        config.check(text, path)?;
        Ok(config)
    }

    fn parse(text: &str, path: &Path) -> Result<Self, ConfigError> {
        toml::from_str(text).map_err(|e| {
            let at = e.span().map_or(0, |span| span.start);
            let line = text.bytes().take(at).filter(|b| *b == b'\n').count() + 1;
            ConfigError::Parse {
                path: path.to_owned(),
                line,
                reason: e.message().to_owned(),
            }
        })
    }

    fn check(&self, text: &str, path: &Path) -> Result<(), ConfigError> {
        let wrong = |key, reason: &str| {
            Err(ConfigError::Value {
                path: path.to_owned(),
                line: line_of(text, key),
                key,
                reason: reason.to_owned(),
            })
        };
        // "/pods/", an id of 76 bytes, "/task.sock", and the 108 bytes of a socket address.
        if self.run_dir.as_os_str().len() > 14 || !self.run_dir.is_absolute() {
            return wrong("run_dir", "must be absolute and have at most 14 characters");
        }
        if !self.socket.is_absolute() {
            return wrong("socket", "must be absolute");
        }
        for (key, path) in [
            ("app.socket", &self.app.socket),
            ("wasm.socket", &self.wasm.socket),
            ("process.socket", &self.process.socket),
        ] {
            if !path.is_absolute() {
                return wrong(key, "must be absolute");
            }
        }
        if !self.wasm.cache_dir.is_absolute() {
            return wrong("wasm.cache_dir", "must be absolute");
        }
        if let Err(reason) = self.metrics.parse() {
            return wrong("metrics.listen", reason);
        }
        if !(64..=1 << 20).contains(&self.wasm.compile_memory_mib) {
            return wrong("wasm.compile_memory_mib", "must be 64 to 1048576");
        }
        if !(1..=10_000).contains(&self.wasm.max_instances) {
            return wrong("wasm.max_instances", "must be 1 to 10000");
        }
        let vm = &self.microvm;
        if vm.default_cpus == 0 || vm.default_cpus > vm.max_cpus || vm.max_cpus > 32 {
            return wrong(
                "microvm.default_cpus",
                "must be at least 1 and at most max_cpus, which is at most 32",
            );
        }
        if vm.default_memory_mib < 48 || vm.default_memory_mib > vm.max_memory_mib {
            return wrong(
                "microvm.default_memory_mib",
                "must be at least 48 and at most max_memory_mib",
            );
        }
        if vm.overhead_mib < 32 {
            return wrong(
                "microvm.overhead_mib",
                "must be at least 32: guest kernel and agent need that",
            );
        }
        if !vm.grow_memory_mib.is_multiple_of(128) {
            return wrong("microvm.grow_memory_mib", "must be a multiple of 128");
        }
        if vm.vhost_net && vm.isolation == Isolation::Process {
            return wrong(
                "microvm.vhost_net",
                "cannot be together with isolation = \"process\": workers have no /dev/vhost-net",
            );
        }
        if vm.grow_cpus > 31 {
            return wrong("microvm.grow_cpus", "must be at most 31");
        }
        if vm.templates > 64 {
            return wrong("microvm.templates", "must be at most 64");
        }
        if vm.disk_slots > 16 {
            return wrong("microvm.disk_slots", "must be at most 16");
        }
        let app = &self.app;
        if app.default_memory_mib < 16 || app.default_memory_mib > app.max_memory_mib {
            return wrong(
                "app.default_memory_mib",
                "must be at least 16 and at most max_memory_mib",
            );
        }
        if app.overhead_mib < 8 {
            return wrong(
                "app.overhead_mib",
                "must be at least 8: the kernel needs that",
            );
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Config, String> {
        Config::read(text, Path::new("x.toml")).map_err(|e| e.to_string())
    }

    #[test]
    fn mistakes_are_named_with_their_line() {
        let error = parse("[microvm]\ndefault_cpus = 2\nmemroy = 3\n").expect_err("unknown key");
        assert!(
            error.contains("line 3") && error.contains("memroy"),
            "{error}"
        );
        let error = parse("[microvm]\ndefault_cpus = \"x\"\n").expect_err("type");
        assert!(error.contains("line 2"), "{error}");
        assert!(parse("run_dir = \"/run/a/very/long/name\"").is_err());
        assert!(parse("[microvm]\nvhost_net = true").is_ok());
        assert!(parse("[microvm]\nvhost_net = true\nisolation = \"process\"").is_err());
        // Values that TOML is content with are named in the same way.
        for (text, line) in [
            (
                "[log]\nlevel = \"x\"\n\n[microvm]\n default_cpus = 0",
                "line 5",
            ),
            ("[wasm]\nsocket = \"/a\"\ncache_dir = \"b\"", "line 3"),
            ("[wasm]\ncompile_memory_mib = 1", "line 2"),
            ("[metrics]\nlisten = \"0.0.0.0:9469\"", "line 2"),
            ("[metrics]\nlisten = \"unix:x\"", "line 2"),
        ] {
            let error = parse(text).expect_err("refused");
            assert!(error.contains(line), "{error}");
        }
    }

    #[test]
    fn figures_stay_on_this_host() {
        let listen = |text: &str| {
            Metrics {
                listen: text.into(),
            }
            .parse()
        };
        assert_eq!(listen(""), Ok(None));
        assert_eq!(
            listen("unix:/run/m"),
            Ok(Some(Listen::Unix("/run/m".into())))
        );
        assert!(matches!(listen("[::1]:9"), Ok(Some(Listen::Loopback(_)))));
        assert!(listen("10.0.0.1:9").is_err() && listen("x").is_err());
    }

    /// The file that is shipped shows every key with its default.
    #[test]
    fn the_example_is_complete() {
        let text = include_str!("../../packaging/sandboxer.toml");
        let mut sections = std::collections::BTreeMap::<&str, String>::new();
        let mut section = "";
        let mut uncommented = String::new();
        for line in text.lines() {
            if let Some(header) = line.strip_prefix('[') {
                section = header.trim_end_matches(']');
            }
            let plain = line.strip_prefix("#").filter(|l| !l.starts_with(' '));
            let kept = plain.unwrap_or(line);
            if !kept.starts_with('#') {
                uncommented.push_str(kept);
                uncommented.push('\n');
                sections
                    .entry(section)
                    .or_default()
                    .push_str(&format!("\n{kept}"));
            }
        }
        let mut config = parse(&uncommented).expect("the example is right");
        // They have no default that could be written down.
        config.microvm.kernel = None;
        config.microvm.image = None;
        config.app.kernel = None;
        config.process.agent = None;
        assert_eq!(config, Config::default());
        for (section, lines) in &sections {
            let header = match *section {
                "" => String::new(),
                name => format!("[{name}]\n"),
            };
            let error = parse(&format!("{header}no_such_key = 1")).expect_err("unknown");
            for key in error.split('`').skip(3).step_by(2) {
                let known = lines.contains(&format!("\n{key} =")) || sections.contains_key(key);
                assert!(known, "{key} of [{section}] is not in the example");
            }
        }
    }

    #[test]
    fn what_is_left_out_has_its_default() {
        let config = parse("[microvm]\ndefault_memory_mib = 512\n").expect("config");
        assert_eq!(config.microvm.default_memory_mib, 512);
        assert_eq!(config.socket, Path::new("/run/bulkhead/microvm.sock"));
    }
}
