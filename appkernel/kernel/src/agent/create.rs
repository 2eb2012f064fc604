//! Making a container: its root, its mounts, its first process.

use alloc::collections::BTreeMap;
use alloc::format;
use alloc::string::{String, ToString};
use alloc::sync::Arc;
use alloc::vec::Vec;

use bulkhead_protocol::rpc::{Code, Status};
use bulkhead_protocol::sandbox::{CONTAINER_OPTIONS_TYPE_URL, ContainerOptions};
use bulkhead_protocol::task::CreateTaskRequest;
use bulkhead_protocol::types::ProcessStatus;
use prost::Message;
use serde_json::Value;

use super::process::{Held, Process, Stdio};
use super::sandbox::SHM_PATH;
use super::{Agent, failed, spec, status};
use crate::container::{self, Container, Mount, Origin, visible};
use crate::fs::node::Node;
use crate::fs::{self, memory};

/// Containers at once.
const MAX_CONTAINERS: usize = 256;

/// Ids are shown and logged.
pub fn check_id(kind: &str, id: &str) -> Result<(), Status> {
    let good = !id.is_empty()
        && id.len() <= 128
        && !id.starts_with('.')
        && id
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"_.+-".contains(&b));
    if good {
        return Ok(());
    }
    let id: String = id.chars().take(150).collect();
    Err(status(
        Code::InvalidArgument,
        format!("{kind} id {id:?} must be 1 to 128 of [A-Za-z0-9_.+-], not starting with a dot"),
    ))
}

fn options(request: &CreateTaskRequest) -> Result<ContainerOptions, Status> {
    let any = request.options.as_ref();
    let any = any.filter(|any| any.type_url == CONTAINER_OPTIONS_TYPE_URL);
    let any = any.ok_or_else(|| {
        status(
            Code::InvalidArgument,
            format!(
                "container {}: options must be a {CONTAINER_OPTIONS_TYPE_URL}",
                request.id
            ),
        )
    })?;
    ContainerOptions::decode(any.value.as_slice())
        .map_err(|e| status(Code::InvalidArgument, format!("options: {e}")))
}

impl Agent {
    /// Makes a container; gives the number of its first process.
    pub(super) fn create(&mut self, request: &CreateTaskRequest) -> Result<u32, Status> {
        let id = &request.id;
        check_id("container", id)?;
        if self.containers.contains_key(id) {
            return Err(status(
                Code::AlreadyExists,
                format!("container {id} exists already"),
            ));
        }
        if self.containers.len() >= MAX_CONTAINERS {
            return Err(status(Code::ResourceExhausted, "too many containers"));
        }
        let options = options(request)?;
        let spec = spec::parse(&options.oci_spec)?;
        self.refuse_unsupported(&spec)?;
        let stdio = self.stdio(
            [&request.stdin, &request.stdout, &request.stderr],
            request.terminal,
        )?;
        let (root, share_read_only) = self.root(request, &spec)?;
        let read_only = share_read_only || spec["root"]["readonly"].as_bool().unwrap_or(false);
        let container =
            container::make(id, root, read_only).map_err(|e| failed("make a container", e))?;
        let made = self.fill(&container, request, &options, &spec, stdio);
        if made.is_err() {
            container::remove(&container);
        }
        made
    }

    /// The streams a call names.
    pub(super) fn stdio(&mut self, names: [&String; 3], terminal: bool) -> Result<Stdio, Status> {
        let mut stdio = Stdio {
            terminal,
            ..Stdio::default()
        };
        for (which, name) in names.into_iter().enumerate() {
            // A terminal has one output.
            if !(terminal && which == 2) {
                stdio.keys[which] = self.take_stream(name)?;
            }
            stdio.names[which] = name.clone();
        }
        Ok(stdio)
    }

    fn refuse_unsupported(&self, spec: &Value) -> Result<(), Status> {
        let hooks = spec["hooks"].as_object();
        if hooks.is_some_and(|h| {
            h.values()
                .any(|l| l.as_array().is_some_and(|l| !l.is_empty()))
        }) {
            return Err(status(
                Code::Unimplemented,
                "OCI spec: hooks are host programs and cannot run in a guest; leave them out",
            ));
        }
        Ok(())
    }

    fn root(&mut self, request: &CreateTaskRequest, spec: &Value) -> Result<(Node, bool), Status> {
        let path = match request.rootfs.as_slice() {
            [] => spec["root"]["path"]
                .as_str()
                .unwrap_or_default()
                .to_string(),
            [mount] if mount.r#type == "bulkhead-share" => mount.source.clone(),
            _ => {
                return Err(status(
                    Code::Unimplemented,
                    "the app kernel takes one rootfs mount of type bulkhead-share",
                ));
            }
        };
        let read_only = request
            .rootfs
            .first()
            .is_some_and(|m| m.options.iter().any(|o| o == "ro"));
        let (node, share_read_only) = self.shares.find(&path)?;
        Ok((node, read_only || share_read_only))
    }

    fn fill(
        &mut self,
        container: &Arc<Container>,
        request: &CreateTaskRequest,
        options: &ContainerOptions,
        spec: &Value,
        stdio: Stdio,
    ) -> Result<u32, Status> {
        container.mount_usual();
        spec::limit(container, &spec["linux"]["resources"]);
        let hostname = spec["hostname"].as_str().unwrap_or_default();
        let hostname = if hostname.is_empty() {
            self.shares.hostname.clone()
        } else {
            hostname.to_string()
        };
        if !hostname.is_empty() {
            *container.hostname.lock() = hostname.into_bytes();
        }
        let mounts = spec["mounts"].as_array().map(Vec::as_slice);
        for mount in mounts.unwrap_or_default() {
            self.mount(container, mount)?;
        }
        if options.sandbox_etc {
            self.mount_etc(container);
        }
        let template = spec["process"].clone();
        let process = spec::process(&template, &options.user, container, request.terminal)?;
        make_directory(container, &process.cwd);
        let (task, pty) = self.make_process(container, &process, &stdio)?;
        let mut processes = BTreeMap::new();
        processes.insert(
            String::new(),
            Process {
                id: task.id,
                state: ProcessStatus::Created,
                exit: None,
                stdio,
                pty,
                spec: None,
            },
        );
        self.containers.insert(
            request.id.clone(),
            Held {
                container: Arc::clone(container),
                bundle: request.bundle.clone(),
                processes,
                template,
                oom_kills: 0,
            },
        );
        Ok(visible(task.id))
    }

    fn mount(&mut self, container: &Container, mount: &Value) -> Result<(), Status> {
        let target = mount["destination"].as_str().unwrap_or_default();
        let source = mount["source"].as_str().unwrap_or_default();
        let kind = mount["type"].as_str().unwrap_or_default();
        let options = spec::strings(&mount["options"]);
        let has = |option: &str| options.iter().any(|o| o == option);
        let at = canonical(target).ok_or_else(|| {
            status(
                Code::InvalidArgument,
                format!("OCI spec: mount at {target:?}: not an absolute path"),
            )
        })?;
        let usual = matches!(
            at.as_slice(),
            b"/proc" | b"/sys" | b"/dev" | b"/dev/pts" | b"/dev/mqueue" | b"/sys/fs/cgroup"
        );
        let (root, read_only) = match kind {
            "proc" | "sysfs" | "devpts" | "mqueue" | "cgroup" | "cgroup2" if usual => return Ok(()),
            "tmpfs" if at == b"/dev" => return Ok(()),
            "tmpfs" => {
                let value = |name: &str| {
                    options
                        .iter()
                        .find_map(|o| o.strip_prefix(name)?.strip_prefix('='))
                };
                let mode = value("mode").and_then(|m| u32::from_str_radix(m, 8).ok());
                let size = value("size").and_then(bytes);
                (
                    Node::Memory(memory::new_for(
                        &container.charge,
                        size,
                        mode.unwrap_or(0o1777) & 0o7777,
                    )),
                    has("ro"),
                )
            }
            "bind" | "" if source == SHM_PATH => {
                (Node::Memory(self.shares.shared_memory()), has("ro"))
            }
            "bind" | "rbind" | "bulkhead-share" | "" => {
                let (node, read_only) = self.shares.find(source)?;
                (node, read_only || has("ro"))
            }
            _ => {
                return Err(status(
                    Code::Unimplemented,
                    format!("OCI spec: mount at {target}: the app kernel has no {kind:?}"),
                ));
            }
        };
        // For those who look into the directory above; what is mounted is found without it.
        if root.is_directory() {
            make_directory(container, target);
        }
        container.mount(Mount {
            at,
            root,
            read_only,
            origin: Origin::Host,
            fixed_read_only: read_only,
            shown: (
                source.to_string(),
                if kind == "tmpfs" { "tmpfs" } else { "virtiofs" }.to_string(),
                "relatime".to_string(),
            ),
        });
        Ok(())
    }

    /// resolv.conf, hosts and hostname of the sandbox, where the container has nothing of its own.
    fn mount_etc(&mut self, container: &Container) {
        for (name, node) in self.shares.etc() {
            let at = format!("/etc/{name}").into_bytes();
            if container.mount_at(&at).is_none() {
                container.mount(Mount {
                    at,
                    root: node,
                    read_only: false,
                    origin: Origin::Host,
                    fixed_read_only: false,
                    shown: (
                        "sandbox".to_string(),
                        "tmpfs".to_string(),
                        "relatime".to_string(),
                    ),
                });
            }
        }
    }
}

/// `64k`, `1m`: bytes.
fn bytes(text: &str) -> Option<u64> {
    let (number, unit) = match text.to_ascii_lowercase().as_bytes().last()? {
        b'k' => (text.get(..text.len() - 1)?, 10),
        b'm' => (text.get(..text.len() - 1)?, 20),
        b'g' => (text.get(..text.len() - 1)?, 30),
        _ => (text, 0),
    };
    number.parse::<u64>().ok()?.checked_shl(unit)
}

/// A path without dots and repeated slashes; `None` if it is relative or leads up.
fn canonical(path: &str) -> Option<Vec<u8>> {
    let rest = path.strip_prefix('/')?;
    let mut clean = Vec::new();
    for part in rest.split('/').filter(|p| !p.is_empty() && *p != ".") {
        if part == ".." {
            return None;
        }
        clean.push(b'/');
        clean.extend(part.bytes());
    }
    if clean.is_empty() {
        clean.push(b'/');
    }
    Some(clean)
}

/// Makes a directory and those above it, as far as the container's files allow.
fn make_directory(container: &Container, path: &str) {
    let mut at = String::new();
    for part in path.split('/').filter(|p| !p.is_empty()) {
        at.push('/');
        at += part;
        match fs::walk(container, b"/", at.as_bytes(), true) {
            Ok(place) if place.found.is_some() => {}
            Ok(place) => {
                let made = place.writable().and_then(|directory| {
                    directory.make_directory(&place.name, 0o755, fs::node::Owner::default())
                });
                // A read-only root without the directory: whoever needs it fails by itself.
                if made.is_err() {
                    return;
                }
            }
            Err(_) => return,
        }
    }
}
