//! From the OCI spec that containerd's CRI makes for a container on this host to the one that the
//! pod's agent runs there: nearly the same.

use bulkhead_protocol::rpc::Status;
use serde_json::Value;

use crate::daemon::agent::spec::{
    bind_source, check, has, has_path, invalid, keep_pods_name, share_memory,
};

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
    // Not there: the host's; by a path: the pod's, which is the host's if the pod has that.
    let own_ipc = named("ipc").is_some_and(has_path) || named("ipc").is_none();
    keep_pods_name(spec);
    mounts(spec, own_ipc)
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
