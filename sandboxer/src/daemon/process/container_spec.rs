//! From the OCI spec that containerd's CRI makes for a container on this host to the one that the
//! pod's agent runs there: nearly the same.

use bulkhead_protocol::rpc::Status;
use serde_json::Value;

use crate::daemon::agent::spec::{bind_source, check, has, invalid, keep_pods_name, share_memory};

/// Changes the spec in place.
///
/// # Errors
/// The spec asks for what this kind cannot give.
pub fn rewrite(spec: &mut Value) -> Result<(), Status> {
    check(spec)?;
    let namespaces = spec["linux"]["namespaces"].as_array();
    let named = |kind: &str| {
        let mut all = namespaces.into_iter().flatten();
        all.find(|ns| ns["type"] == kind)
    };
    if named("user").is_some() {
        return Err(invalid(
            "user namespaces are not supported by bulkhead-process: leave hostUsers at its default",
        ));
    }
    if named("pid").is_none() {
        return Err(invalid(
            "the host's processes cannot be shown by bulkhead-process: leave hostPID out",
        ));
    }
    // Left out, it is the host's, and with it the host's shared memory.
    let pods_ipc = named("ipc").is_some();
    keep_pods_name(spec);
    mounts(spec, pods_ipc)
}

fn mounts(spec: &mut Value, pods_ipc: bool) -> Result<(), Status> {
    for mount in spec["mounts"].as_array_mut().into_iter().flatten() {
        if mount.get("uidMappings").is_some_and(|m| !m.is_null()) {
            return Err(invalid(
                "idmapped mounts are not supported by bulkhead-process",
            ));
        }
        if pods_ipc && share_memory(mount) {
            continue;
        }
        if bind_source(mount)?.is_some() && (has(mount, "rshared") || has(mount, "shared")) {
            return Err(invalid(format!(
                "mount at {}: what a pod of bulkhead-process mounts does not appear on the host: \
                 use another mountPropagation than Bidirectional, or another runtime, such as \
                 runc, for this pod",
                mount["destination"]
            )));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn spec() -> Value {
        json!({
            "hostname": "x",
            "process": {"args": ["sh"]},
            "mounts": [
                {"destination": "/dev/shm", "type": "bind", "source": "/dev/shm", "options": ["rbind"]},
                {"destination": "/data", "type": "bind", "source": "/srv/data", "options": ["rbind", "rslave", "ro"]},
            ],
            "linux": {
                "namespaces": [
                    {"type": "pid"}, {"type": "mount"},
                    {"type": "network", "path": "/proc/7/ns/net"},
                    {"type": "uts", "path": "/proc/7/ns/uts"},
                    {"type": "ipc", "path": "/proc/7/ns/ipc"},
                ],
                "resources": {"cpu": {"cpus": "0-3"}},
                "devices": [{"path": "/dev/sda", "type": "b", "major": 8, "minor": 0}],
            },
        })
    }

    #[test]
    fn what_the_host_has_stays() {
        let mut rewritten = spec();
        rewrite(&mut rewritten).expect("rewritten");
        assert_eq!(rewritten["mounts"][0]["source"], "/run/bulkhead/shm");
        assert_eq!(rewritten["mounts"][1], spec()["mounts"][1]);
        assert_eq!(rewritten["linux"], spec()["linux"]);
        assert!(rewritten.get("hostname").is_none());
        // With the host's IPC comes its memory.
        let mut hosts = spec();
        hosts["linux"]["namespaces"] = json!([{"type": "pid"}, {"type": "mount"}]);
        rewrite(&mut hosts).expect("rewritten");
        assert_eq!(hosts["mounts"][0]["source"], "/dev/shm");
    }

    #[test]
    fn what_cannot_be_given_is_refused() {
        let refused = |change: &dyn Fn(&mut Value)| {
            let mut spec = spec();
            change(&mut spec);
            rewrite(&mut spec).expect_err("refused").message
        };
        let user = json!([{"type": "user"}, {"type": "pid"}]);
        assert!(refused(&|s| s["linux"]["namespaces"] = user.clone()).contains("hostUsers"));
        let none = json!([{"type": "mount"}]);
        assert!(refused(&|s| s["linux"]["namespaces"] = none.clone()).contains("hostPID"));
        let shared = json!(["rbind", "rshared"]);
        assert!(refused(&|s| s["mounts"][1]["options"] = shared.clone()).contains("Bidirectional"));
        assert!(refused(&|s| s["mounts"][1]["source"] = json!("x")).contains("absolute"));
        assert!(refused(&|s| *s = json!([])).contains("linux part"));
    }

    proptest::proptest! {
        #[test]
        fn any_mounts_are_answered(text in "[a-z/\\[\\]{}\":,]{0,200}") {
            let mounts: Value = serde_json::from_str(&text).unwrap_or(json!([text]));
            let mut spec = spec();
            spec["mounts"] = mounts;
            let _ = rewrite(&mut spec);
        }
    }
}
