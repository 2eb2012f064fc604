//! The OCI runtime spec of a container, from its image's configuration and the user's wishes.
//!
//! Written as JSON and read by the agent with its own types; the tests check that both agree.

use serde_json::{Value, json};

use crate::image::ImageConfig;

/// Search path where neither image nor user sets one; docker's.
const DEFAULT_PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Capabilities of a container's processes: docker's default set.
const CAPABILITIES: [&str; 14] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FSETID",
    "CAP_FOWNER",
    "CAP_MKNOD",
    "CAP_NET_RAW",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETFCAP",
    "CAP_SETPCAP",
    "CAP_NET_BIND_SERVICE",
    "CAP_SYS_CHROOT",
    "CAP_KILL",
    "CAP_AUDIT_WRITE",
];

/// Kernel interfaces that are hidden in the container, although its kernel is its own: programs
/// find what they find elsewhere, and a container cannot hurt its neighbours of the same pod.
const MASKED: [&str; 9] = [
    "/proc/acpi",
    "/proc/asound",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/sched_debug",
    "/proc/scsi",
    "/sys/firmware",
];

const READ_ONLY: [&str; 5] = [
    "/proc/bus",
    "/proc/fs",
    "/proc/irq",
    "/proc/sys",
    "/proc/sysrq-trigger",
];

/// Open files of a container's processes.
const NOFILE: u64 = 1 << 20;

/// A directory or file of the guest that appears in the container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BindMount {
    /// Path in the guest.
    pub source: String,
    /// Path in the container.
    pub target: String,
    /// The container cannot write.
    pub read_only: bool,
}

/// What the user wants to be different from the image's configuration.
#[derive(Debug, Clone, Default)]
pub struct Overrides {
    /// Command and arguments; empty: the image's.
    pub command: Vec<String>,
    /// Replaces the image's entrypoint; an empty string removes it.
    pub entrypoint: Option<String>,
    /// `KEY=value`, after the image's.
    pub env: Vec<String>,
    /// Working directory.
    pub workdir: Option<String>,
    /// `user[:group]`.
    pub user: Option<String>,
    /// Host name.
    pub hostname: String,
    /// The root filesystem cannot be written.
    pub read_only: bool,
    /// The process gets a terminal.
    pub terminal: bool,
    /// Volumes.
    pub binds: Vec<BindMount>,
}

/// Why no spec can be made.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum SpecError {
    /// Nothing to run.
    #[error("no command: the image names none; give one after the image")]
    NoCommand,
    /// Not an absolute path.
    #[error("working directory {0:?}: must be an absolute path")]
    Workdir(String),
    /// A NUL byte would cut an argument short.
    #[error("{0}: holds a NUL byte")]
    Nul(&'static str),
}

/// A container's spec and what goes beside it.
#[derive(Debug, Clone)]
pub struct Spec {
    /// `config.json`.
    pub json: Value,
    /// The user by name or number, looked up in the container by the agent; may be empty.
    pub user: String,
}

impl Spec {
    /// The command line, for people.
    pub fn command(&self) -> Vec<String> {
        self.json["process"]["args"]
            .as_array()
            .map(|args| {
                args.iter()
                    .filter_map(|a| a.as_str().map(str::to_owned))
                    .collect()
            })
            .unwrap_or_default()
    }
}

/// Entrypoint and command as docker merges them.
fn arguments(image: &ImageConfig, wish: &Overrides) -> Vec<String> {
    let filled = |list: &Option<Vec<String>>| list.clone().unwrap_or_default();
    let mut args = match &wish.entrypoint {
        Some(entry) if entry.is_empty() => Vec::new(),
        Some(entry) => vec![entry.clone()],
        None => filled(&image.entrypoint),
    };
    if !wish.command.is_empty() {
        args.extend(wish.command.iter().cloned());
    } else if wish.entrypoint.is_none() {
        // A replaced entrypoint does not get arguments meant for the old one.
        args.extend(filled(&image.cmd));
    }
    args
}

/// Later entries replace earlier ones of the same name; the place of the first is kept.
fn environment(image: &ImageConfig, wish: &Overrides) -> Vec<String> {
    let mut env: Vec<String> = vec![DEFAULT_PATH.to_owned()];
    if wish.terminal {
        env.push("TERM=xterm".into());
    }
    if !wish.hostname.is_empty() {
        env.push(format!("HOSTNAME={}", wish.hostname));
    }
    for entry in image.env.iter().flatten().chain(&wish.env) {
        let Some((name, _)) = entry.split_once('=') else {
            continue;
        };
        match env
            .iter_mut()
            .find(|e| e.split_once('=').is_some_and(|(n, _)| n == name))
        {
            Some(old) => old.clone_from(entry),
            None => env.push(entry.clone()),
        }
    }
    env
}

fn mounts(wish: &Overrides) -> Value {
    let mount = |target: &str, kind: &str, source: &str, options: &[&str]| json!({"destination": target, "type": kind, "source": source, "options": options});
    let mut list = vec![
        mount("/proc", "proc", "proc", &["nosuid", "noexec", "nodev"]),
        mount(
            "/dev",
            "tmpfs",
            "tmpfs",
            &["nosuid", "strictatime", "mode=755", "size=65536k"],
        ),
        mount(
            "/dev/pts",
            "devpts",
            "devpts",
            &[
                "nosuid",
                "noexec",
                "newinstance",
                "ptmxmode=0666",
                "mode=0620",
                "gid=5",
            ],
        ),
        mount(
            "/dev/shm",
            "tmpfs",
            "shm",
            &["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"],
        ),
        mount(
            "/dev/mqueue",
            "mqueue",
            "mqueue",
            &["nosuid", "noexec", "nodev"],
        ),
        mount(
            "/sys",
            "sysfs",
            "sysfs",
            &["nosuid", "noexec", "nodev", "ro"],
        ),
        mount(
            "/sys/fs/cgroup",
            "cgroup",
            "cgroup",
            &["nosuid", "noexec", "nodev", "relatime", "ro"],
        ),
    ];
    for bind in &wish.binds {
        // A volume over a default mount replaces it.
        list.retain(|m| m["destination"] != bind.target.as_str());
        list.push(mount(
            &bind.target,
            "bind",
            &bind.source,
            &[
                "rbind",
                "rprivate",
                if bind.read_only { "ro" } else { "rw" },
            ],
        ));
    }
    Value::Array(list)
}

/// Builds the spec.
///
/// # Errors
/// There is no command, or a value cannot be.
pub fn build(image: &ImageConfig, wish: &Overrides) -> Result<Spec, SpecError> {
    let args = arguments(image, wish);
    if args.first().is_none_or(String::is_empty) {
        return Err(SpecError::NoCommand);
    }
    let env = environment(image, wish);
    if args.iter().any(|a| a.contains('\0')) {
        return Err(SpecError::Nul("command"));
    }
    if env.iter().any(|e| e.contains('\0')) {
        return Err(SpecError::Nul("environment"));
    }
    let from_image = image.working_dir.clone().filter(|d| !d.is_empty());
    let cwd = wish
        .workdir
        .clone()
        .or(from_image)
        .unwrap_or_else(|| "/".into());
    if !cwd.starts_with('/') {
        return Err(SpecError::Workdir(cwd));
    }
    let user = wish
        .user
        .clone()
        .or_else(|| image.user.clone())
        .unwrap_or_default();
    let json = json!({
        "ociVersion": "1.1.0",
        "process": {
            "terminal": wish.terminal,
            "user": {"uid": 0, "gid": 0},
            "args": args,
            "env": env,
            "cwd": cwd,
            "capabilities": {"bounding": CAPABILITIES, "effective": CAPABILITIES, "permitted": CAPABILITIES},
            "rlimits": [{"type": "RLIMIT_NOFILE", "hard": NOFILE, "soft": NOFILE}],
            "noNewPrivileges": false,
        },
        "root": {"path": "rootfs", "readonly": wish.read_only},
        "hostname": wish.hostname,
        "mounts": mounts(wish),
        "linux": {
            // The network is the sandbox's: no namespace of its own.
            "namespaces": [{"type": "pid"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"}, {"type": "cgroup"}],
            "maskedPaths": MASKED,
            "readonlyPaths": READ_ONLY,
        },
    });
    Ok(Spec { json, user })
}

/// The OCI process of an `exec`, from the container's spec.
///
/// # Errors
/// As [`build`].
pub fn exec_process(spec: &Value, wish: &Overrides) -> Result<Value, SpecError> {
    if wish.command.first().is_none_or(String::is_empty) {
        return Err(SpecError::NoCommand);
    }
    let mut process = spec["process"].clone();
    let image_env = process["env"].as_array().map(|list| {
        list.iter()
            .filter_map(|e| e.as_str().map(str::to_owned))
            .collect()
    });
    let base = ImageConfig {
        env: image_env,
        ..ImageConfig::default()
    };
    if let Some(cwd) = &wish.workdir {
        if !cwd.starts_with('/') {
            return Err(SpecError::Workdir(cwd.clone()));
        }
        process["cwd"] = json!(cwd);
    }
    process["args"] = json!(wish.command);
    process["env"] = json!(environment(&base, wish));
    process["terminal"] = json!(wish.terminal);
    Ok(process)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn strings(list: &[&str]) -> Vec<String> {
        list.iter().map(|s| (*s).to_owned()).collect()
    }

    fn image() -> ImageConfig {
        ImageConfig {
            entrypoint: Some(strings(&["/entry", "--x"])),
            cmd: Some(strings(&["serve"])),
            env: Some(strings(&["A=1", "PATH=/bin"])),
            working_dir: Some("/srv".into()),
            user: Some("www".into()),
            ..ImageConfig::default()
        }
    }

    #[test]
    fn commands_merge_as_docker_does() {
        let args = |wish: Overrides| build(&image(), &wish).map(|s| s.command());
        assert_eq!(
            args(Overrides::default()),
            Ok(strings(&["/entry", "--x", "serve"]))
        );
        let command = strings(&["sh", "-c", "x"]);
        assert_eq!(
            args(Overrides {
                command: command.clone(),
                ..Overrides::default()
            }),
            Ok(strings(&["/entry", "--x", "sh", "-c", "x"]))
        );
        let entry = Overrides {
            entrypoint: Some("/bin/ls".into()),
            ..Overrides::default()
        };
        assert_eq!(args(entry), Ok(strings(&["/bin/ls"])));
        let none = Overrides {
            entrypoint: Some(String::new()),
            command,
            ..Overrides::default()
        };
        assert_eq!(args(none), Ok(strings(&["sh", "-c", "x"])));
        assert_eq!(
            build(&ImageConfig::default(), &Overrides::default()).map(|_| ()),
            Err(SpecError::NoCommand)
        );
    }

    #[test]
    fn the_users_environment_wins() {
        let wish = Overrides {
            env: strings(&["A=2", "B=3"]),
            terminal: true,
            hostname: "h".into(),
            ..Overrides::default()
        };
        let spec = build(&image(), &wish).expect("spec");
        assert_eq!(
            spec.json["process"]["env"],
            json!(["PATH=/bin", "TERM=xterm", "HOSTNAME=h", "A=2", "B=3"])
        );
        assert_eq!(
            (spec.json["process"]["cwd"].as_str(), spec.user.as_str()),
            (Some("/srv"), "www")
        );
    }

    #[test]
    fn bad_values_are_named() {
        let workdir = Overrides {
            workdir: Some("x".into()),
            ..Overrides::default()
        };
        assert_eq!(
            build(&image(), &workdir).map(|_| ()),
            Err(SpecError::Workdir("x".into()))
        );
        let nul = Overrides {
            command: strings(&["a\0b"]),
            ..Overrides::default()
        };
        assert_eq!(
            build(&image(), &nul).map(|_| ()),
            Err(SpecError::Nul("command"))
        );
    }

    #[test]
    fn the_agents_types_read_it() {
        let bind = BindMount {
            source: "/run/bulkhead/share/volumes/0".into(),
            target: "/data".into(),
            read_only: true,
        };
        let wish = Overrides {
            binds: vec![bind],
            read_only: true,
            ..Overrides::default()
        };
        let spec = build(&image(), &wish).expect("spec");
        let parsed: oci_spec::runtime::Spec =
            serde_json::from_value(spec.json.clone()).expect("a runtime spec");
        assert_eq!(
            parsed.root().as_ref().and_then(|r| r.readonly()),
            Some(true)
        );
        let data = parsed
            .mounts()
            .iter()
            .flatten()
            .find(|m| m.destination().ends_with("data"))
            .expect("volume");
        assert!(data.options().iter().flatten().any(|o| o == "ro"));
        let exec = exec_process(
            &spec.json,
            &Overrides {
                command: strings(&["ls"]),
                ..Overrides::default()
            },
        )
        .expect("process");
        let _: oci_spec::runtime::Process = serde_json::from_value(exec).expect("a process");
    }
}
