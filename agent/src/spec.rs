//! From the host's OCI spec to the one that libcontainer runs.

use std::fs::File;
use std::path::Path;

use bulkhead_protocol::sandbox::ContainerOptions;
use serde_json::{Value, json};

use crate::cgroup::{self, Cgroup};
use crate::disks;
use crate::error::{Context, Error, Result};
use crate::mounts::Shares;
use crate::users;

/// Files of the sandbox that containers may want in /etc.
pub const ETC_DIR: &str = "/run/bulkhead/etc";

/// A spec that is ready, and what is needed of it later.
#[derive(Debug)]
pub struct Prepared {
    /// config.json.
    pub config: Vec<u8>,
    /// User and group of the process.
    pub owner: (u32, u32),
    /// Initial size of the terminal: columns, rows.
    pub console_size: Option<(u16, u16)>,
    /// `linux.resources.devices`.
    pub devices: Value,
    /// For processes that join later.
    pub defaults: Defaults,
}

/// What processes that join a container take from it when they do not say.
#[derive(Clone, Debug, Default)]
pub struct Defaults {
    /// `linux.seccomp`.
    pub seccomp: Value,
    /// `process.capabilities`.
    pub capabilities: Value,
    /// `process.noNewPrivileges`.
    pub no_new_privileges: Value,
    /// `process.oomScoreAdj`.
    pub oom_score: Value,
    /// `process.rlimits`.
    pub rlimits: Value,
}

fn invalid(message: impl std::fmt::Display) -> Error {
    Error::Invalid(format!("OCI spec: {message}"))
}

/// Where a container's things are.
#[derive(Clone, Copy, Debug)]
pub struct Place<'a> {
    /// The container.
    pub id: &'a str,
    /// Its bundle directory, ours alone.
    pub bundle: &'a Path,
    /// Its root, mounted.
    pub root: &'a Path,
    /// Whether it has a terminal.
    pub terminal: bool,
    /// PID 1 of the namespace that containers share, for one that [`shares_pids`].
    pub pid_namespace: Option<i32>,
    /// Its disks.
    pub disks: &'a [disks::Mapped],
}

/// Makes a spec fit for this guest. Mounts from shares are pinned below the bundle.
pub fn prepare(options: &ContainerOptions, place: Place<'_>, shares: &Shares) -> Result<Prepared> {
    let mut spec: Value = serde_json::from_slice(&options.oci_spec)
        .map_err(|error| invalid(format!("not JSON: {error}")))?;
    if !spec.is_object() {
        return Err(invalid("not an object"));
    }
    refuse_hooks(&spec)?;
    let object = spec
        .as_object_mut()
        .ok_or_else(|| invalid("not an object"))?;
    object.remove("hooks");
    object.entry("ociVersion").or_insert_with(|| json!("1.0.2"));
    let readonly = object
        .get("root")
        .and_then(|r| r.get("readonly"))
        .and_then(Value::as_bool)
        .unwrap_or(false);
    object.insert(
        "root".into(),
        json!({"path": place.root, "readonly": readonly}),
    );
    prepare_linux(&mut spec, place.id, place.pid_namespace)?;
    disks::translate(&mut spec, place.disks, place.id)?;
    prepare_mounts(&mut spec, options.sandbox_etc, place, shares)?;

    let root = File::open(place.root).context(|| format!("open {}", place.root.display()))?;
    let process = spec
        .get_mut("process")
        .filter(|p| p.is_object())
        .ok_or_else(|| invalid("process is missing"))?;
    if !options.user.is_empty() {
        set_user(process, &users::lookup(&root, &options.user)?);
    }
    let owner = prepare_process(process, &root, place.terminal)?;
    let console_size = console_size(process);
    let defaults = Defaults {
        capabilities: process["capabilities"].clone(),
        no_new_privileges: process["noNewPrivileges"].clone(),
        oom_score: process["oomScoreAdj"].clone(),
        rlimits: process["rlimits"].clone(),
        seccomp: spec
            .pointer("/linux/seccomp")
            .cloned()
            .unwrap_or(Value::Null),
    };
    Ok(Prepared {
        config: serde_json::to_vec(&spec).map_err(invalid)?,
        owner,
        console_size,
        devices: spec
            .pointer("/linux/resources/devices")
            .cloned()
            .unwrap_or(Value::Null),
        defaults,
    })
}

fn refuse_hooks(spec: &Value) -> Result<()> {
    let Some(hooks) = spec.get("hooks").and_then(Value::as_object) else {
        return Ok(());
    };
    for (kind, list) in hooks {
        if list.as_array().is_some_and(|l| !l.is_empty()) {
            return Err(Error::Unsupported(format!(
                "OCI spec: hooks.{kind}: hooks are host programs and cannot run in a guest; leave \
                 them out"
            )));
        }
    }
    Ok(())
}

/// Whether a container is to be in the PID namespace that containers share: whatever the path of its
/// own is, as with networks.
pub fn shares_pids(options: &ContainerOptions) -> bool {
    let spec: Value = serde_json::from_slice(&options.oci_spec).unwrap_or_default();
    spec.pointer("/linux/namespaces")
        .and_then(Value::as_array)
        .is_some_and(|all| {
            all.iter()
                .any(|ns| ns["type"] == "pid" && ns["path"].as_str().is_some_and(|p| !p.is_empty()))
        })
}

fn prepare_linux(spec: &mut Value, id: &str, pid_namespace: Option<i32>) -> Result<()> {
    let linux = spec
        .as_object_mut()
        .ok_or_else(|| invalid("not an object"))?
        .entry("linux")
        .or_insert_with(|| json!({}))
        .as_object_mut()
        .ok_or_else(|| invalid("linux is not an object"))?;
    linux.insert("cgroupsPath".into(), json!(Cgroup::oci_path(id)));
    // No SELinux here: the VM is the wall.
    linux.remove("mountLabel");
    linux.remove("intelRdt");
    if !crate::in_guest() {
        // For volumes that follow mounts of the host: their pins say so.
        linux.remove("rootfsPropagation");
    }
    if linux.get("seccomp").is_some_and(Value::is_null) {
        linux.remove("seccomp");
    }
    let namespaces = linux.entry("namespaces").or_insert_with(
        || json!([{"type": "pid"}, {"type": "mount"}, {"type": "ipc"}, {"type": "cgroup"}]),
    );
    let list = namespaces
        .as_array_mut()
        .ok_or_else(|| invalid("linux.namespaces is not a list"))?;
    let mut error = None;
    if let Some(pid) = pid_namespace {
        for ns in list.iter_mut().filter(|ns| ns["type"] == "pid") {
            ns["path"] = json!(format!("/proc/{pid}/ns/pid"));
        }
    }
    list.retain(|ns| {
        let kind = ns["type"].as_str().unwrap_or_default();
        let has_path = ns["path"].as_str().is_some_and(|p| !p.is_empty());
        match kind {
            // Of the host, meaning the pod's: that is this guest itself.
            "network" | "ipc" | "uts" if has_path => false,
            // The shared one, by our own path.
            "pid" if has_path && pid_namespace.is_some() => true,
            _ if has_path => {
                error = Some(Error::Unsupported(format!(
                    "OCI spec: linux.namespaces: a {kind} namespace given by path is the host's; \
                     leave the path out"
                )));
                true
            }
            _ => true,
        }
    });
    if let Some(error) = error {
        return Err(error);
    }
    if !list.iter().any(|ns| ns["type"] == "mount") {
        return Err(invalid(
            "linux.namespaces: a mount namespace is needed in a guest",
        ));
    }
    if !list.iter().any(|ns| ns["type"] == "pid") {
        return Err(invalid(
            "linux.namespaces: a pid namespace is needed in a guest",
        ));
    }
    if let Some(resources) = linux.get_mut("resources")
        && !cgroup::controllers().iter().any(|c| c == "memory")
        && crate::testing()
    {
        cgroup::drop_missing(resources, &cgroup::controllers());
    }
    Ok(())
}

/// A process object, of a spec or of Exec, as the helper wants it. Gives user and group.
pub fn prepare_process(
    process: &mut Value,
    root: impl std::os::fd::AsFd,
    terminal: bool,
) -> Result<(u32, u32)> {
    if let Some(name) = process
        .pointer("/user/username")
        .and_then(Value::as_str)
        .filter(|n| !n.is_empty())
    {
        let user = users::lookup(root.as_fd(), name)?;
        set_user(process, &user);
    }
    let id = |v: &Value, key: &str| -> Result<u32> {
        match v.pointer(&format!("/user/{key}")) {
            None | Some(Value::Null) => Ok(0),
            Some(n) => n
                .as_u64()
                .and_then(|n| u32::try_from(n).ok())
                .ok_or_else(|| invalid(format!("process.user.{key} is not an id"))),
        }
    };
    let owner = (id(process, "uid")?, id(process, "gid")?);
    let object = process
        .as_object_mut()
        .ok_or_else(|| invalid("process is not an object"))?;
    let user = object.entry("user").or_insert_with(|| json!({}));
    if let Some(user) = user.as_object_mut() {
        user.remove("username");
        user.entry("uid").or_insert_with(|| json!(0));
        user.entry("gid").or_insert_with(|| json!(0));
    }
    object.insert("terminal".into(), json!(terminal));
    object.entry("cwd").or_insert_with(|| json!("/"));
    if !crate::in_guest() {
        // Else it would have ours, which the kernel never kills for memory.
        object.entry("oomScoreAdj").or_insert_with(|| json!(0));
    }
    object.remove("apparmorProfile");
    object.remove("selinuxLabel");
    // libcontainer takes "false" for "load the seccomp profile late", which then fails.
    if object.get("noNewPrivileges") == Some(&json!(false)) {
        object.remove("noNewPrivileges");
    }
    if !object
        .get("args")
        .and_then(Value::as_array)
        .is_some_and(|a| !a.is_empty() && a.iter().all(Value::is_string))
    {
        return Err(invalid("process.args must name a program"));
    }
    let env = object
        .entry("env")
        .or_insert_with(|| json!([]))
        .as_array_mut()
        .ok_or_else(|| invalid("process.env is not a list"))?;
    let has = |env: &[Value], name: &str| {
        env.iter()
            .any(|e| e.as_str().is_some_and(|e| e.starts_with(name)))
    };
    if !has(env, "PATH=") {
        env.push(json!(
            "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        ));
    }
    // Always: libcontainer would ask the C library, which loads code from the container's root.
    if !has(env, "HOME=") {
        let home = users::home(root, owner.0)
            .unwrap_or_else(|| if owner.0 == 0 { "/root" } else { "/" }.to_owned());
        env.push(json!(format!("HOME={home}")));
    }
    if terminal && !has(env, "TERM=") {
        env.push(json!("TERM=xterm"));
    }
    Ok(owner)
}

fn set_user(process: &mut Value, user: &users::User) {
    let umask = process.pointer("/user/umask").cloned();
    process["user"] = json!({
        "uid": user.uid,
        "gid": user.gid,
        "additionalGids": user.groups,
    });
    if let Some(umask) = umask {
        process["user"]["umask"] = umask;
    }
    if let (Some(home), Some(env)) = (&user.home, process["env"].as_array_mut())
        && !env
            .iter()
            .any(|e| e.as_str().is_some_and(|e| e.starts_with("HOME=")))
    {
        env.push(json!(format!("HOME={home}")));
    }
}

/// `process.consoleSize`: columns, rows.
pub fn console_size(process: &Value) -> Option<(u16, u16)> {
    let get = |key: &str| {
        process
            .pointer(&format!("/consoleSize/{key}"))
            .and_then(Value::as_u64)
            .and_then(|n| u16::try_from(n).ok())
    };
    let (columns, rows) = (get("width")?, get("height")?);
    (columns > 0 && rows > 0).then_some((columns, rows))
}

/// Fills in what a joining process does not say.
pub fn apply_defaults(process: &mut Value, defaults: &Defaults) {
    let missing = |v: Option<&Value>| v.is_none_or(Value::is_null);
    for (key, value) in [
        // Without this a process with no list would keep every capability.
        ("capabilities", &defaults.capabilities),
        ("noNewPrivileges", &defaults.no_new_privileges),
        ("oomScoreAdj", &defaults.oom_score),
        ("rlimits", &defaults.rlimits),
    ] {
        if missing(process.get(key)) && !value.is_null() {
            process[key] = value.clone();
        }
    }
    if missing(process.get("capabilities")) {
        process["capabilities"] = json!({
            "bounding": [], "effective": [], "permitted": [], "inheritable": [], "ambient": []
        });
    }
}

/// Whether a volume follows later mounts of the host is said by its pin: libcontainer 0.7 refuses
/// mounts that are to be slaves, and leaves the propagation of others as it is.
fn settle_propagation(mount: &mut Value, pin: &Path) -> Result<()> {
    let mut follows = false;
    if let Some(options) = mount["options"].as_array_mut() {
        options.retain(|option| {
            let slave = option == "slave" || option == "rslave";
            follows |= slave;
            !slave
        });
    }
    match follows {
        true => Ok(()),
        false => crate::mounts::make_private(pin),
    }
}

fn prepare_mounts(
    spec: &mut Value,
    sandbox_etc: bool,
    place: Place<'_>,
    shares: &Shares,
) -> Result<()> {
    let mounts = spec
        .as_object_mut()
        .ok_or_else(|| invalid("not an object"))?
        .entry("mounts")
        .or_insert_with(|| json!([]))
        .as_array_mut()
        .ok_or_else(|| invalid("mounts is not a list"))?;
    if mounts.len() > 1024 {
        return Err(Error::Limit(
            "OCI spec: more than 1024 mounts in one container".to_owned(),
        ));
    }
    if sandbox_etc {
        for name in ["resolv.conf", "hosts", "hostname"] {
            let (source, target) = (format!("{ETC_DIR}/{name}"), format!("/etc/{name}"));
            let taken = mounts.iter().any(|m| m["destination"] == *target);
            if !taken && Path::new(&source).exists() {
                mounts.push(json!({
                    "destination": target, "type": "bind", "source": source,
                    "options": ["rbind", "rprivate"],
                }));
            }
        }
    }
    let pins = place.bundle.join("mounts");
    std::fs::create_dir_all(&pins).context(|| format!("make {}", pins.display()))?;
    for (n, mount) in mounts.iter_mut().enumerate() {
        let is_bind = mount["type"] == "bind"
            || mount["options"]
                .as_array()
                .is_some_and(|o| o.iter().any(|o| o == "bind" || o == "rbind"));
        if !is_bind {
            continue;
        }
        let source = mount["source"].as_str().unwrap_or_default();
        // Volumes hold what containers put there: resolve once, safely, and pin the result.
        if let Some(fd) = shares.open(source)? {
            let pin = pins.join(n.to_string());
            shares.pin(&fd, &pin)?;
            if shares.are_hosts() {
                settle_propagation(mount, &pin)?;
            }
            mount["source"] = json!(pin);
        } else if !Path::new(source).exists() {
            return Err(invalid(format!(
                "mounts: source {source:?} does not exist in the guest; share it first"
            )));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shared_pid_namespace_is_ours() {
        let namespaces = json!([
            {"type": "pid", "path": "/proc/1/ns/pid"}, {"type": "mount"}, {"type": "uts", "path": "/x"},
        ]);
        let mut spec = json!({"linux": {"namespaces": namespaces}});
        let options = ContainerOptions {
            oci_spec: spec.to_string().into_bytes(),
            ..ContainerOptions::default()
        };
        assert!(shares_pids(&options) && !shares_pids(&ContainerOptions::default()));
        prepare_linux(&mut spec, "c", Some(77)).unwrap();
        assert_eq!(
            spec["linux"]["namespaces"],
            json!([{"type": "pid", "path": "/proc/77/ns/pid"}, {"type": "mount"}])
        );
    }

    fn run(spec: Value, options: ContainerOptions) -> Result<(Value, Prepared)> {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("rootfs");
        std::fs::create_dir_all(root.join("etc")).unwrap();
        std::fs::write(
            root.join("etc/passwd"),
            "root:x:0:0::/root:/bin/sh\nwww:x:33:34::/www:/bin/sh\n",
        )
        .unwrap();
        let options = ContainerOptions {
            oci_spec: serde_json::to_vec(&spec).unwrap(),
            ..options
        };
        let place = Place {
            id: "c1",
            bundle: dir.path(),
            root: &root,
            terminal: false,
            pid_namespace: None,
            disks: &[],
        };
        let prepared = prepare(&options, place, &Shares::default())?;
        Ok((serde_json::from_slice(&prepared.config).unwrap(), prepared))
    }

    #[test]
    fn host_parts_are_replaced() {
        let (spec, prepared) = run(
            json!({
                "root": {"path": "/host/path", "readonly": true},
                "process": {"args": ["sh"], "noNewPrivileges": false, "apparmorProfile": "x",
                            "user": {"uid": 5, "gid": 6}},
                "hooks": {"prestart": []},
                "linux": {
                    "cgroupsPath": "/kubepods/x",
                    "namespaces": [
                        {"type": "pid"}, {"type": "mount"},
                        {"type": "network", "path": "/proc/1/ns/net"}, {"type": "uts", "path": "/x"},
                    ],
                },
            }),
            ContainerOptions::default(),
        )
        .unwrap();
        assert_eq!(spec["root"]["readonly"], true);
        assert!(spec["root"]["path"].as_str().unwrap().ends_with("/rootfs"));
        assert_eq!(spec["linux"]["cgroupsPath"], "/containers/c1");
        assert_eq!(
            spec["linux"]["namespaces"],
            json!([{"type": "pid"}, {"type": "mount"}])
        );
        assert!(spec.get("hooks").is_none());
        let process = &spec["process"];
        assert!(process.get("noNewPrivileges").is_none());
        assert!(process.get("apparmorProfile").is_none());
        assert_eq!(process["cwd"], "/");
        assert_eq!(prepared.owner, (5, 6));
    }

    #[test]
    fn users_are_looked_up_in_the_container() {
        let (spec, prepared) = run(
            json!({"process": {"args": ["sh"], "env": []}}),
            ContainerOptions {
                user: "www".into(),
                ..Default::default()
            },
        )
        .unwrap();
        assert_eq!(prepared.owner, (33, 34));
        let env = spec["process"]["env"].as_array().unwrap();
        assert!(env.contains(&json!("HOME=/www")));
        assert!(env.iter().any(|e| e.as_str().unwrap().starts_with("PATH=")));
    }

    #[test]
    fn what_cannot_be_is_refused_by_name() {
        let refused = |spec: Value| {
            run(spec, ContainerOptions::default())
                .unwrap_err()
                .to_string()
        };
        let ok = json!({"args": ["sh"]});
        assert!(refused(json!(5)).contains("not an object"));
        assert!(refused(json!({})).contains("process is missing"));
        assert!(refused(json!({"process": {"args": []}})).contains("process.args"));
        let hooks = json!({"process": ok, "hooks": {"prestart": [{"path": "/x"}]}});
        assert!(refused(hooks).contains("hooks.prestart"));
        let ns = json!({"process": ok, "linux": {"namespaces": [{"type": "pid"}]}});
        assert!(refused(ns).contains("mount namespace"));
        let ns = json!({"process": ok, "linux": {"namespaces": [{"type": "pid", "path": "/x"}]}});
        assert!(refused(ns).contains("pid namespace given by path"));
        let mount = json!({"process": ok, "mounts": [{"destination": "/x", "type": "bind", "source": "/no/such"}]});
        assert!(refused(mount).contains("/no/such"));
    }

    #[test]
    fn joining_processes_never_get_more_than_the_container() {
        let mut process = json!({"args": ["sh"]});
        apply_defaults(&mut process, &Defaults::default());
        assert_eq!(process["capabilities"]["effective"], json!([]));
        let mut process = json!({"args": ["sh"], "capabilities": null});
        let defaults = Defaults {
            capabilities: json!({"bounding": ["CAP_CHOWN"]}),
            no_new_privileges: json!(true),
            ..Default::default()
        };
        apply_defaults(&mut process, &defaults);
        assert_eq!(process["capabilities"]["bounding"], json!(["CAP_CHOWN"]));
        assert_eq!(process["noNewPrivileges"], true);
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_are_answered(bytes in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..200)) {
            let place = Place { id: "x", bundle: Path::new("/nonexistent"), root: Path::new("/nonexistent"), terminal: false, pid_namespace: None, disks: &[] };
            let options = ContainerOptions { oci_spec: bytes, ..Default::default() };
            proptest::prop_assert!(prepare(&options, place, &Shares::default()).is_err());
        }
    }
}
