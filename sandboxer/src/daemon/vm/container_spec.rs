//! From the OCI spec that containerd's CRI makes for a container on this host to the one that its
//! guest can run: paths of volumes, namespaces, and what only a host has.

use serde_json::{Value, json};

use bulkhead_protocol::rpc::Status;

use crate::daemon::agent::spec::{
    bind_source, check, has, has_path, invalid, keep_pods_name, share_memory,
};
use crate::daemon::storage::Access;

/// Devices that every guest has under the same numbers.
const COMMON_DEVICES: [&str; 8] = [
    "/dev/null",
    "/dev/zero",
    "/dev/full",
    "/dev/random",
    "/dev/urandom",
    "/dev/tty",
    "/dev/net/tun",
    "/dev/fuse",
];

/// A bind mount whose source is on the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostBind {
    /// Which of the spec's mounts.
    pub index: usize,
    /// Path on the host.
    pub source: String,
    /// What the guest may do with it.
    pub access: Access,
}

/// A block device of the host that the spec names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostDevice {
    /// Where the container has it.
    pub path: String,
    /// Major and minor number on the host.
    pub number: (u32, u32),
    /// The container may not write to it.
    pub read_only: bool,
}

/// What a spec wants of the host.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Wanted {
    /// Volumes, whose sources are to be replaced with [`set_source`] or [`make_device`].
    pub binds: Vec<HostBind>,
    /// Block devices.
    pub devices: Vec<HostDevice>,
}

/// Changes the spec in place, for an agent that `shares_pids` among containers or does not. Gives
/// what the guest needs of the host.
///
/// # Errors
/// The spec asks for what a VM cannot give.
pub fn rewrite(spec: &mut Value, shares_pids: bool) -> Result<Wanted, Status> {
    check(spec)?;
    namespaces(spec, shares_pids)?;
    if let Some(linux) = spec["linux"].as_object_mut() {
        // For volumes that follow mounts of the host, which is the host's part.
        linux.remove("rootfsPropagation");
    }
    resources(spec);
    let devices = devices(spec)?;
    let binds = mounts(spec)?;
    Ok(Wanted { binds, devices })
}

/// Turns volumes that are block devices into devices of the container; `binds` are those, with the
/// devices' numbers. Owner and mode of the device file come from the host's.
pub fn make_devices(spec: &mut Value, binds: &[(HostBind, (u32, u32))]) -> Vec<HostDevice> {
    use std::os::unix::fs::MetadataExt;
    let mut devices = Vec::new();
    for (bind, number) in binds {
        let path = spec["mounts"][bind.index]["destination"].clone();
        let meta = std::fs::metadata(&bind.source).ok();
        let meta = meta.map(|m| (m.mode() & 0o777, m.uid(), m.gid()));
        let (mode, uid, gid) = meta.unwrap_or((0o600, 0, 0));
        let (major, minor) = *number;
        let linux = &mut spec["linux"];
        if !linux["resources"].is_object() {
            linux["resources"] = json!({});
        }
        push(
            &mut linux["devices"],
            json!({
                "path": path, "type": "b", "major": major, "minor": minor,
                "fileMode": mode, "uid": uid, "gid": gid,
            }),
        );
        // Who names one device means to use it, unlike one who mounts all of /dev.
        let access = if bind.access.read_only { "rm" } else { "rwm" };
        push(
            &mut linux["resources"]["devices"],
            json!({
                "allow": true, "type": "b", "major": major, "minor": minor, "access": access,
            }),
        );
        devices.push(HostDevice {
            path: path.as_str().unwrap_or_default().to_owned(),
            number: *number,
            read_only: bind.access.read_only,
        });
    }
    if let Some(mounts) = spec["mounts"].as_array_mut() {
        let mut index = 0;
        mounts.retain(|_| {
            index += 1;
            !binds.iter().any(|(bind, _)| bind.index + 1 == index)
        });
    }
    devices
}

fn push(list: &mut Value, item: Value) {
    match list.as_array_mut() {
        Some(list) => list.push(item),
        None => *list = json!([item]),
    }
}

/// Puts the guest's path of a volume into the spec.
pub fn set_source(spec: &mut Value, bind: &HostBind, guest_path: String) {
    if let Some(mount) = spec["mounts"].get_mut(bind.index) {
        mount["source"] = json!(guest_path);
    }
}

fn namespaces(spec: &mut Value, shares_pids: bool) -> Result<(), Status> {
    let Some(list) = spec["linux"]["namespaces"].as_array_mut() else {
        return Err(invalid("the container's OCI spec names no namespaces"));
    };
    for ns in list.iter_mut() {
        let kind = ns["type"].as_str().unwrap_or_default().to_owned();
        match kind.as_str() {
            "user" => {
                return Err(invalid(
                    "user namespaces of the host mean nothing in a VM: leave hostUsers at its default",
                ));
            }
            // The agent knows the pod's by any path.
            "pid" if has_path(ns) && !shares_pids => {
                if let Some(ns) = ns.as_object_mut() {
                    ns.remove("path");
                }
            }
            _ => {}
        }
    }
    if !list.iter().any(|ns| ns["type"] == "pid") {
        // The host's: to a pod in a VM that is what its containers share.
        list.push(match shares_pids {
            true => json!({"type": "pid", "path": "/proc/1/ns/pid"}),
            false => json!({"type": "pid"}),
        });
    }
    keep_pods_name(spec);
    Ok(())
}

fn resources(spec: &mut Value) {
    let Some(resources) = spec["linux"]["resources"].as_object_mut() else {
        return;
    };
    strip_resources(resources);
}

/// Takes out of OCI resources what means nothing in a guest: numbers of the host's CPUs, memory
/// nodes and block devices, and controllers that guests do not have.
pub fn strip_resources(resources: &mut serde_json::Map<String, Value>) {
    for key in ["hugepageLimits", "rdma", "blockIO", "network"] {
        resources.remove(key);
    }
    if let Some(cpu) = resources.get_mut("cpu").and_then(Value::as_object_mut) {
        cpu.remove("cpus");
        cpu.remove("mems");
        for key in ["realtimePeriod", "realtimeRuntime"] {
            cpu.remove(key);
        }
    }
    if let Some(unified) = resources.get_mut("unified").and_then(Value::as_object_mut) {
        unified.retain(|key, _| {
            key.starts_with("memory.") || key.starts_with("pids.") || key.starts_with("cpu.")
        });
    }
}

/// Whether a rule is about one device alone, and allows something.
fn allows(rule: &Value, device: &Value) -> bool {
    let same = |key: &str| !rule[key].is_null() && rule[key] == device[key];
    rule["allow"] == true && same("type") && same("major") && same("minor")
}

/// Leaves those devices in the list that a guest has itself, and the host's block devices, which
/// it gives.
fn devices(spec: &mut Value) -> Result<Vec<HostDevice>, Status> {
    // A privileged container may use every device there is: those of its guest.
    let privileged = spec["linux"]["resources"]["devices"]
        .as_array()
        .is_some_and(|rules| {
            rules.iter().any(|r| {
                r["allow"] == true
                    && r["major"].is_null()
                    && r["minor"].is_null()
                    && (r["type"].is_null() || r["type"] == "a" || r["type"] == "")
            })
        });
    let rules = spec["linux"]["resources"]["devices"].clone();
    let rules = rules.as_array().map(Vec::as_slice).unwrap_or_default();
    let Some(list) = spec["linux"]["devices"].as_array_mut() else {
        return Ok(Vec::new());
    };
    let (mut found, mut foreign) = (Vec::new(), None);
    list.retain(|device| {
        let path = device["path"].as_str().unwrap_or_default();
        if COMMON_DEVICES.contains(&path) {
            return true;
        }
        let number = |key: &str| device[key].as_u64().and_then(|n| u32::try_from(n).ok());
        let rule = rules.iter().rev().find(|rule| allows(rule, device));
        let access = rule.map(|rule| rule["access"].as_str().unwrap_or("rwm"));
        match (access, number("major"), number("minor")) {
            (Some(access), Some(major), Some(minor)) if device["type"] == "b" => {
                found.push(HostDevice {
                    path: path.to_owned(),
                    number: (major, minor),
                    read_only: !access.contains('w'),
                });
                true
            }
            // All of the host's are listed for a privileged container: nobody has asked for this.
            (None, ..) if privileged => false,
            _ => {
                foreign.get_or_insert_with(|| path.to_owned());
                false
            }
        }
    });
    match foreign {
        Some(path) => Err(invalid(format!(
            "device {path:?}: only block devices of the host can be given to a VM"
        ))),
        None => Ok(found),
    }
}

fn mounts(spec: &mut Value) -> Result<Vec<HostBind>, Status> {
    let Some(list) = spec["mounts"].as_array_mut() else {
        return Ok(Vec::new());
    };
    let mut binds = Vec::new();
    for (index, mount) in list.iter_mut().enumerate() {
        if mount.get("uidMappings").is_some_and(|m| !m.is_null()) {
            return Err(invalid("idmapped mounts cannot be given to a VM"));
        }
        // One for all containers of the pod.
        if share_memory(mount) {
            continue;
        }
        let Some(source) = bind_source(mount)?.map(str::to_owned) else {
            continue;
        };
        if has(mount, "rshared") || has(mount, "shared") {
            return Err(invalid(format!(
                "mount at {}: what a VM mounts cannot appear on the host: use another \
                 mountPropagation than Bidirectional, or a runtime without VMs for this pod",
                mount["destination"]
            )));
        }
        let access = Access {
            read_only: has(mount, "ro") || has(mount, "rro"),
            recursive: has(mount, "rro"),
            follow_mounts: has(mount, "rslave") || has(mount, "slave"),
        };
        // The host's part is done there; inside of the guest nobody else mounts below. Read-only
        // is the host's part as well: the guest, for which all of it is one file system, would
        // close writable mounts below too.
        if let Some(options) = mount["options"].as_array_mut() {
            options.retain(|o| {
                !matches!(
                    o.as_str(),
                    Some("rslave" | "slave" | "rro" | "private" | "rprivate")
                ) && (o != "ro" || access.recursive)
            });
            options.push(json!("rprivate"));
            if access.recursive {
                options.push(json!("ro"));
            }
        }
        binds.push(HostBind {
            index,
            source,
            access,
        });
    }
    Ok(binds)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec() -> Value {
        json!({
            "hostname": "x",
            "process": {"args": ["sh"]},
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc"},
                {"destination": "/dev/shm", "type": "tmpfs", "source": "shm"},
                {"destination": "/data", "type": "bind", "source": "/srv/data", "options": ["rbind", "rslave", "ro"]},
            ],
            "linux": {
                "namespaces": [
                    {"type": "pid"}, {"type": "mount"},
                    {"type": "network", "path": "/proc/7/ns/net"},
                    {"type": "uts", "path": "/proc/7/ns/uts"},
                    {"type": "ipc", "path": "/proc/7/ns/ipc"},
                ],
                "resources": {"cpu": {"cpus": "0-3", "shares": 2}, "hugepageLimits": [{"pageSize": "2MB", "limit": 0}]},
                "devices": [{"path": "/dev/null"}],
                "rootfsPropagation": "rslave",
            },
        })
    }

    #[test]
    fn what_only_a_host_has_goes() {
        let mut spec = spec();
        let Wanted { binds, devices } = rewrite(&mut spec, true).expect("rewritten");
        assert_eq!(devices, []);
        assert_eq!(
            binds,
            [HostBind {
                index: 2,
                source: "/srv/data".into(),
                access: Access {
                    read_only: true,
                    recursive: false,
                    follow_mounts: true,
                },
            }]
        );
        set_source(&mut spec, &binds[0], "/run/bulkhead/volumes/1".into());
        assert_eq!(spec["mounts"][2]["source"], "/run/bulkhead/volumes/1");
        assert_eq!(spec["mounts"][2]["options"], json!(["rbind", "rprivate"]));
        assert_eq!(spec["mounts"][1]["source"], "/run/bulkhead/shm");
        assert!(spec.get("hostname").is_none());
        assert_eq!(spec["linux"]["namespaces"][0], json!({"type": "pid"}));
        assert!(spec["linux"].get("rootfsPropagation").is_none());
        let resources = &spec["linux"]["resources"];
        assert_eq!(resources["cpu"], json!({"shares": 2}));
        assert!(resources.get("hugepageLimits").is_none());
    }

    #[test]
    fn pids_are_shared_where_the_agent_can() {
        let kind = |shares, namespaces: Value| -> Value {
            let mut spec = spec();
            spec["linux"]["namespaces"] = namespaces;
            rewrite(&mut spec, shares).expect("rewritten");
            let all = spec["linux"]["namespaces"].as_array().cloned();
            let found = all
                .unwrap_or_default()
                .into_iter()
                .find(|ns| ns["type"] == "pid");
            found.unwrap_or_default()["path"].clone()
        };
        let pods = json!([{"type": "pid", "path": "/proc/7/ns/pid"}]);
        assert_eq!(kind(true, pods.clone()), "/proc/7/ns/pid");
        assert_eq!(kind(false, pods), Value::Null);
        // hostPID
        assert!(kind(true, json!([])).is_string());
        assert_eq!(kind(true, json!([{"type": "pid"}])), Value::Null);
    }

    #[test]
    fn what_a_vm_cannot_give_is_refused() {
        let mut user = spec();
        user["linux"]["namespaces"] = json!([{"type": "user"}]);
        assert!(rewrite(&mut user, true).is_err());
        let mut shared = spec();
        shared["mounts"][2]["options"] = json!(["rbind", "rshared"]);
        assert!(rewrite(&mut shared, true).is_err());
        let mut device = spec();
        device["linux"]["devices"] =
            json!([{"path": "/dev/kvm", "type": "c", "major": 10, "minor": 232}]);
        assert!(rewrite(&mut device, true).is_err());
        device["linux"]["resources"]["devices"] = json!([{"allow": true, "access": "rwm"}]);
        assert!(rewrite(&mut device, true).is_ok());
        assert_eq!(device["linux"]["devices"], json!([]));
        assert!(rewrite(&mut json!([]), true).is_err());
    }

    #[test]
    fn block_devices_are_given() {
        let block = |minor| json!({"path": "/dev/xvda", "type": "b", "major": 7, "minor": minor});
        let rule = |minor, access: &str| json!({"allow": true, "type": "b", "major": 7, "minor": minor, "access": access});
        let wanted = |devices: Value, rules: Value| {
            let mut spec = spec();
            spec["linux"]["devices"] = devices;
            spec["linux"]["resources"]["devices"] = rules;
            rewrite(&mut spec, true).map(|w| w.devices)
        };
        let given = |minor, read_only| HostDevice {
            path: "/dev/xvda".into(),
            number: (7, minor),
            read_only,
        };
        let deny = json!({"allow": false, "access": "rwm"});
        assert_eq!(
            wanted(
                json!([block(1), block(2)]),
                json!([deny, rule(1, "rwm"), rule(2, "rm")])
            ),
            Ok(vec![given(1, false), given(2, true)])
        );
        // All of the host's, of which one was asked for.
        let all = json!({"allow": true, "access": "rwm"});
        assert_eq!(
            wanted(json!([block(1), block(2)]), json!([rule(2, "rw"), all])),
            Ok(vec![given(2, false)])
        );
        // Nobody may open it.
        assert!(wanted(json!([block(1)]), json!([deny])).is_err());
    }

    #[test]
    fn a_volume_that_is_a_block_device_becomes_one() {
        let mut spec = spec();
        let Wanted { binds, .. } = rewrite(&mut spec, true).expect("rewritten");
        let devices = make_devices(&mut spec, &[(binds[0].clone(), (7, 5))]);
        assert_eq!(
            devices,
            [HostDevice {
                path: "/data".into(),
                number: (7, 5),
                read_only: true,
            }]
        );
        assert_eq!(spec["mounts"].as_array().map(Vec::len), Some(2));
        let device = &spec["linux"]["devices"][1];
        assert_eq!(
            (&device["path"], &device["minor"]),
            (&json!("/data"), &json!(5))
        );
        let rule = &spec["linux"]["resources"]["devices"][0];
        assert_eq!(rule["access"], "rm");
    }

    proptest::proptest! {
        #[test]
        fn any_mounts_are_answered(text in "[a-z/\\[\\]{}\":,]{0,200}") {
            let mounts: Value = serde_json::from_str(&text).unwrap_or(json!([text]));
            let mut spec = spec();
            spec["mounts"] = mounts;
            let _ = rewrite(&mut spec, true);
        }
    }
}
