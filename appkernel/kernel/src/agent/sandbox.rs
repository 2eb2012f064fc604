//! What the containers of the sandbox share: directories of the host, names, shared memory.

use alloc::format;
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;

use bulkhead_protocol::rpc::{Code, Status};
use bulkhead_protocol::sandbox::{ConfigureSandboxRequest, Share};

use super::{Agent, failed, status};
use crate::fs::fuse::{self, Fuse};
use crate::fs::memory;
use crate::fs::node::{Node, Owner, kind};
use crate::net::interface;
use crate::start::Machine;

/// Where containers find the sandbox's shared memory.
pub const SHM_PATH: &str = "/run/bulkhead/shm";
/// Where shares are.
const PREFIX: &str = "/run/bulkhead/";

/// See the module.
pub struct Shares {
    machine: Machine,
    /// Path, root, whether it cannot be written.
    mounted: Vec<(String, Node, bool)>,
    pub hostname: String,
    etc: Vec<(&'static str, Node)>,
    shm: Option<Arc<memory::Node>>,
}

impl Shares {
    /// Nothing is shared yet.
    pub fn new(machine: Machine) -> Self {
        Self {
            machine,
            mounted: Vec::new(),
            hostname: String::new(),
            etc: Vec::new(),
            shm: None,
        }
    }

    fn mount(&mut self, share: &Share) -> Result<(), Status> {
        let name = share.path.strip_prefix(PREFIX).unwrap_or_default();
        if name.is_empty() || name.split('/').any(|p| matches!(p, "" | "." | "..")) {
            return Err(status(
                Code::InvalidArgument,
                format!(
                    "share {:?}: {:?} is not below {PREFIX}",
                    share.tag, share.path
                ),
            ));
        }
        if self.mounted.iter().any(|(path, ..)| *path == share.path) {
            return Ok(());
        }
        let known = fuse::mounted(&share.tag);
        let fuse = known.or_else(|| {
            let device = self.machine.devices.iter().find(|device| {
                Fuse::tag_of(device, self.machine.ram_end).is_some_and(|tag| tag == share.tag)
            })?;
            Fuse::probe(device, self.machine.ram_end)
        });
        let fuse = fuse.ok_or_else(|| {
            status(
                Code::NotFound,
                format!(
                    "share {:?}: there is no such device, or it does not work",
                    share.tag
                ),
            )
        })?;
        let read_only = share.options.iter().any(|o| o == "ro");
        self.mounted
            .push((share.path.clone(), Node::Share(fuse.root()), read_only));
        Ok(())
    }

    /// The file at a path of the guest, below a share. Links are not followed: a container could
    /// have made them.
    pub fn find(&self, path: &str) -> Result<(Node, bool), Status> {
        let found = self.mounted.iter().find_map(|(at, root, read_only)| {
            let rest = path.strip_prefix(at.as_str())?;
            (rest.is_empty() || rest.starts_with('/')).then_some((rest, root, *read_only))
        });
        let (rest, root, read_only) = found.ok_or_else(|| {
            status(
                Code::NotFound,
                format!("{path:?} is not below a share that is mounted"),
            )
        })?;
        let mut node = root.clone();
        for part in rest.split('/').filter(|p| !p.is_empty()) {
            if part == ".." {
                return Err(status(Code::InvalidArgument, format!("{path:?} leads up")));
            }
            node = node.lookup(part.as_bytes()).map_err(|e| failed(path, e))?;
        }
        if node.is_link() {
            return Err(status(
                Code::InvalidArgument,
                format!("{path:?} is a symbolic link"),
            ));
        }
        Ok((node, read_only))
    }

    /// The sandbox's shared memory.
    pub fn shared_memory(&mut self) -> Arc<memory::Node> {
        let shm = self
            .shm
            .get_or_insert_with(|| memory::new(Some(64 << 20), 0o1777));
        Arc::clone(shm)
    }

    /// The sandbox's files for /etc.
    pub fn etc(&self) -> Vec<(&'static str, Node)> {
        self.etc.clone()
    }

    fn write_etc(&mut self, name: &'static str, text: &str) -> Result<(), Status> {
        let write = || {
            let dir = memory::new(None, 0o755);
            let file = dir.make(
                name.as_bytes(),
                kind::REGULAR | 0o644,
                0,
                &[],
                Owner::default(),
            )?;
            file.write(0, text.as_bytes())?;
            Ok(Node::Memory(file))
        };
        let node = write().map_err(|e| failed(name, e))?;
        self.etc.retain(|(known, _)| *known != name);
        self.etc.push((name, node));
        Ok(())
    }
}

/// Text for a file: no line of it may become two.
fn one_line(kind: &str, text: &str) -> Result<(), Status> {
    if text.is_empty() || text.chars().any(|c| c.is_control() || c.is_whitespace()) {
        let text: String = text.chars().take(64).collect();
        return Err(status(
            Code::InvalidArgument,
            format!("{kind} {text:?} must be one word"),
        ));
    }
    Ok(())
}

impl Agent {
    /// Sets the sandbox up; gives what was left out.
    pub(super) fn configure(
        &mut self,
        request: &ConfigureSandboxRequest,
    ) -> Result<Vec<String>, Status> {
        let mut warnings = Vec::new();
        for share in &request.shares {
            self.shares.mount(share)?;
        }
        if !request.hostname.is_empty() {
            one_line("host name", &request.hostname)?;
            self.shares.hostname.clone_from(&request.hostname);
            self.shares
                .write_etc("hostname", &format!("{}\n", request.hostname))?;
        }
        if let Some(dns) = &request.dns {
            let mut text = String::new();
            for server in &dns.servers {
                one_line("name server", server)?;
                text += &format!("nameserver {server}\n");
            }
            for (keyword, words) in [("search", &dns.searches), ("options", &dns.options)] {
                for word in words {
                    one_line(keyword, word)?;
                }
                if !words.is_empty() {
                    text += &format!("{keyword} {}\n", words.join(" "));
                }
            }
            self.shares.write_etc("resolv.conf", &text)?;
        }
        if !request.hosts.is_empty() {
            self.shares.write_etc("hosts", &request.hosts)?;
        } else if !request.hostname.is_empty() {
            let text = format!(
                "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n127.0.1.1\t{}\n",
                request.hostname
            );
            self.shares.write_etc("hosts", &text)?;
        }
        for name in request.sysctls.keys() {
            warnings.push(format!("sysctl {name} cannot be set in the app kernel"));
        }
        let network = interface::configure(&self.shares.machine, request);
        warnings.extend(network.map_err(|e| status(Code::InvalidArgument, e))?);
        self.reached("configured");
        Ok(warnings)
    }
}
