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

/// Changes the spec in place, for an agent that `shares_pids` among containers or does not. Gives
/// the volumes that the guest needs to see, whose sources are to be replaced with [`set_source`].
///
/// # Errors
/// The spec asks for what a VM cannot give.
pub fn rewrite(spec: &mut Value, shares_pids: bool) -> Result<Vec<HostBind>, Status> {
    check(spec)?;
    namespaces(spec, shares_pids)?;
    if let Some(linux) = spec["linux"].as_object_mut() {
        // For volumes that follow mounts of the host, which is the host's part.
        linux.remove("rootfsPropagation");
    }
    resources(spec);
    devices(spec)?;
    mounts(spec)
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

fn devices(spec: &mut Value) -> Result<(), Status> {
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
    let Some(list) = spec["linux"]["devices"].as_array_mut() else {
        return Ok(());
    };
    let mut foreign = None;
    list.retain(|device| {
        let path = device["path"].as_str().unwrap_or_default();
        let common = COMMON_DEVICES.contains(&path);
        if !common {
            foreign.get_or_insert_with(|| path.to_owned());
        }
        common
    });
    match foreign {
        Some(path) if !privileged => Err(invalid(format!(
            "device {path:?}: devices of the host cannot be given to a VM"
        ))),
        _ => Ok(()),
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
        let binds = rewrite(&mut spec, true).expect("rewritten");
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
        device["linux"]["devices"] = json!([{"path": "/dev/sda"}]);
        assert!(rewrite(&mut device, true).is_err());
        device["linux"]["resources"]["devices"] = json!([{"allow": true, "access": "rwm"}]);
        assert!(rewrite(&mut device, true).is_ok());
        assert_eq!(device["linux"]["devices"], json!([]));
        assert!(rewrite(&mut json!([]), true).is_err());
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
