//! What is done to every OCI spec that containerd's CRI makes, before an agent gets it.

use bulkhead_protocol::rpc::{Code, Status};
use serde_json::{Value, json};

/// Where the agent keeps the pod's shared memory.
const SHM: &str = "/run/bulkhead/shm";
/// Mounts a container may have.
const MAX_MOUNTS: usize = 1000;

/// A spec that cannot be, and why.
pub fn invalid(text: impl Into<String>) -> Status {
    Status::new(Code::InvalidArgument, text)
}

/// Refuses what is no spec of a Linux container.
///
/// # Errors
/// The reason.
pub fn check(spec: &Value) -> Result<(), Status> {
    if !spec.is_object() || !spec["linux"].is_object() {
        return Err(invalid("the container's OCI spec has no linux part"));
    }
    if !spec["linux"]["namespaces"].is_array() {
        return Err(invalid("the container's OCI spec names no namespaces"));
    }
    let mounts = spec["mounts"].as_array().map_or(0, Vec::len);
    match mounts > MAX_MOUNTS {
        true => Err(invalid(format!("more than {MAX_MOUNTS} mounts"))),
        false => Ok(()),
    }
}

/// Takes the host name out if setting it would need a namespace of the container's own.
pub fn keep_pods_name(spec: &mut Value) {
    let own = spec["linux"]["namespaces"].as_array().is_some_and(|all| {
        let is_own = |ns: &Value| ns["type"] == "uts" && !has_path(ns);
        all.iter().any(is_own)
    });
    if !own && let Some(spec) = spec.as_object_mut() {
        spec.remove("hostname");
        spec.remove("domainname");
    }
}

/// Whether a namespace is one that exists.
pub fn has_path(namespace: &Value) -> bool {
    namespace["path"].as_str().is_some_and(|p| !p.is_empty())
}

/// Whether a mount has an option.
pub fn has(mount: &Value, option: &str) -> bool {
    let options = mount["options"].as_array();
    options.is_some_and(|all| all.iter().any(|o| o == option))
}

/// What a mount binds, if it is a bind.
///
/// # Errors
/// That is no absolute path.
pub fn bind_source(mount: &Value) -> Result<Option<&str>, Status> {
    if mount["type"] != "bind" && !has(mount, "bind") && !has(mount, "rbind") {
        return Ok(None);
    }
    let source = mount["source"].as_str().unwrap_or_default();
    match source.starts_with('/') {
        true => Ok(Some(source)),
        false => Err(invalid(format!(
            "mount at {}: source {source:?} is not an absolute path",
            mount["destination"]
        ))),
    }
}

/// Makes shared memory the pod's, where the host's or one of the container's own was meant. Gives
/// whether it did.
pub fn share_memory(mount: &mut Value) -> bool {
    if mount["destination"] != "/dev/shm" {
        return false;
    }
    if mount["source"] != "/dev/shm" && matches!(bind_source(mount), Ok(Some(_)) | Err(_)) {
        return false;
    }
    // One for all containers of the pod.
    *mount = json!({
        "destination": "/dev/shm", "type": "bind", "source": SHM,
        "options": ["rbind", "rprivate", "nosuid", "noexec", "nodev"],
    });
    true
}
