//! What is needed of an OCI runtime spec.

use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::sync::atomic::Ordering;

use appkernel_core::errno::Errno;
use appkernel_core::fair;
use appkernel_hal::clock;
use bulkhead_protocol::rpc::{Code, Status};
use serde_json::Value;

use super::{failed, status};
use crate::container::Container;
use crate::exec::Request;
use crate::fs;
use crate::task::{Credentials, Limits};

/// Longest /etc/passwd or /etc/group that is read.
const MAX_USERS_FILE: usize = 1 << 20;
/// Where programs are looked for without a PATH.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// A process to run.
pub struct Process {
    pub arguments: Vec<String>,
    pub environment: Vec<String>,
    pub cwd: String,
    pub credentials: Credentials,
    pub umask: u32,
    pub no_new_privileges: bool,
    pub limits: Limits,
    /// Columns and rows of its terminal.
    pub size: Option<(u16, u16)>,
}

fn invalid(message: impl core::fmt::Display) -> Status {
    status(Code::InvalidArgument, format!("OCI spec: {message}"))
}

/// Reads JSON.
pub fn parse(bytes: &[u8]) -> Result<Value, Status> {
    serde_json::from_slice(bytes).map_err(|e| invalid(format_args!("not JSON: {e}")))
}

/// Strings of a list.
pub fn strings(value: &Value) -> Vec<String> {
    let list = value.as_array().map(Vec::as_slice).unwrap_or_default();
    list.iter()
        .filter_map(|v| v.as_str().map(ToString::to_string))
        .collect()
}

fn id(value: &Value) -> Option<u32> {
    value.as_u64().and_then(|n| u32::try_from(n).ok())
}

/// Sets the limits of a container that a spec's resources name; -1 is none.
pub fn limit(container: &Container, resources: &Value) {
    let most = |value: &Value| {
        let number = value.as_i64()?;
        Some(u64::try_from(number).ok().filter(|n| *n > 0))
    };
    if let Some(bytes) = most(&resources["memory"]["limit"]) {
        container
            .charge
            .limit(bytes.map_or(u64::MAX, |b| b.div_ceil(4096)));
    }
    if let Some(tasks) = most(&resources["pids"]["limit"]) {
        let tasks = tasks.unwrap_or(u64::MAX);
        container.pids_max.store(tasks, Ordering::Relaxed);
    }
    let cpu = &resources["cpu"];
    let mut share = container.share.lock();
    if let Some(weight) = cpu["shares"].as_u64().filter(|w| *w > 0) {
        share.set_weight(weight);
    }
    let ns = |us: u64| us.saturating_mul(1000);
    let quota = most(&cpu["quota"]).map(|us| us.map(ns));
    let period = cpu["period"].as_u64().filter(|us| *us > 0).map(ns);
    if quota.is_some() || period.is_some() {
        share.set_quota(quota, period, clock::monotonic_ns());
    }
    // As files of cgroups, which come last.
    let unified = |file: &str| resources["unified"][file].as_str().map(str::trim);
    let number = |text: &str| match text {
        "max" => Some(u64::MAX),
        text => text.parse().ok(),
    };
    if let Some((quota, period)) = unified("cpu.max").and_then(fair::parse_max) {
        share.set_quota(Some(quota), period, clock::monotonic_ns());
    }
    if let Some(weight) = unified("cpu.weight").and_then(number) {
        share.set_weight(fair::shares_of(weight));
    }
    drop(share);
    if let Some(tasks) = unified("pids.max").and_then(number) {
        container.pids_max.store(tasks, Ordering::Relaxed);
    }
    if let Some(bytes) = unified("memory.max").and_then(number) {
        let pages = (bytes != u64::MAX).then(|| bytes.div_ceil(4096));
        container.charge.limit(pages.unwrap_or(u64::MAX));
    }
}

/// Reads a process object; `user` (by name or number) replaces its own.
pub fn process(
    value: &Value,
    user: &str,
    container: &Container,
    terminal: bool,
) -> Result<Process, Status> {
    let arguments = strings(&value["args"]);
    if arguments.first().is_none_or(String::is_empty) {
        return Err(invalid("process.args must name a program"));
    }
    let name = match user {
        "" => value["user"]["username"].as_str().unwrap_or_default(),
        user => user,
    };
    let (credentials, home) = if name.is_empty() {
        let own = &value["user"];
        let (uid, gid) = (id(&own["uid"]).unwrap_or(0), id(&own["gid"]).unwrap_or(0));
        let groups = own["additionalGids"].as_array();
        let groups = groups.into_iter().flatten().filter_map(id).collect();
        let home = find_user(container, &uid.to_string())
            .ok()
            .and_then(|u| u.1);
        (Credentials::of(uid, gid, groups), home)
    } else {
        find_user(container, name)?
    };
    let mut environment = strings(&value["env"]);
    let has = |environment: &[String], name: &str| environment.iter().any(|e| e.starts_with(name));
    if !has(&environment, "PATH=") {
        environment.push(format!("PATH={DEFAULT_PATH}"));
    }
    if !has(&environment, "HOME=") {
        let usual = if credentials.uid == 0 { "/root" } else { "/" };
        let home = home.unwrap_or_else(|| usual.to_string());
        environment.push(format!("HOME={home}"));
    }
    if terminal && !has(&environment, "TERM=") {
        environment.push("TERM=xterm".to_string());
    }
    let cwd = value["cwd"].as_str().unwrap_or("/");
    if !cwd.starts_with('/') {
        return Err(invalid("process.cwd must be an absolute path"));
    }
    let side = |name: &str| {
        let number = value["consoleSize"][name].as_u64()?;
        u16::try_from(number).ok().filter(|n| *n > 0)
    };
    Ok(Process {
        arguments,
        environment,
        cwd: cwd.to_string(),
        credentials,
        umask: id(&value["user"]["umask"]).unwrap_or(0o22) & 0o777,
        no_new_privileges: value["noNewPrivileges"] == true,
        limits: Limits::of_spec(value),
        size: side("width").zip(side("height")),
    })
}

/// Reads a small file of the container.
pub fn read_file(container: &Container, path: &str) -> Result<Vec<u8>, Errno> {
    let node = fs::resolve(container, b"/", path.as_bytes(), true)?.node;
    if !node.is_regular() {
        return Err(Errno::EINVAL);
    }
    let size = node.attributes()?.size.min(MAX_USERS_FILE as u64) as usize;
    let mut bytes = alloc::vec![0; size];
    let count = node.read(0, &mut bytes)?;
    bytes.truncate(count);
    Ok(bytes)
}

/// Looks up `user[:group]`, by name or number, in the container's own files.
fn find_user(container: &Container, wanted: &str) -> Result<(Credentials, Option<String>), Status> {
    let text = |path| {
        let bytes = read_file(container, path).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    };
    let (passwd, group) = (text("/etc/passwd"), text("/etc/group"));
    let (user, group_name) = match wanted.split_once(':') {
        Some((user, group)) => (user, Some(group).filter(|g| !g.is_empty())),
        None => (wanted, None),
    };
    let line = |text: &str, name: &str, fields: usize| -> Option<Vec<String>> {
        let find = |place: usize| {
            text.lines().find_map(|line| {
                let parts: Vec<String> = line.split(':').map(ToString::to_string).collect();
                (parts.len() >= fields && parts.get(place)? == name).then_some(parts)
            })
        };
        // Names first: one may be a number.
        find(0).or_else(|| find(2))
    };
    let number = |text: Option<&String>| text.and_then(|t| t.parse::<u32>().ok());
    let missing = |kind: &str, name: &str| {
        let name: String = name.chars().take(64).collect();
        invalid(format_args!(
            "{kind} {name:?} is not in the container's files"
        ))
    };
    let entry = line(&passwd, user, 4);
    let (uid, mut gid, home, name) = match &entry {
        Some(parts) => (
            number(parts.get(2)).ok_or_else(|| missing("user", user))?,
            number(parts.get(3)).unwrap_or(0),
            parts.get(5).filter(|h| h.starts_with('/')).cloned(),
            parts.first().cloned().unwrap_or_default(),
        ),
        None => (
            user.parse().map_err(|_| missing("user", user))?,
            0,
            None,
            String::new(),
        ),
    };
    let mut groups = Vec::new();
    match group_name {
        Some(wanted) => {
            gid = match line(&group, wanted, 3) {
                Some(parts) => number(parts.get(2)).ok_or_else(|| missing("group", wanted))?,
                None => wanted.parse().map_err(|_| missing("group", wanted))?,
            };
        }
        None => {
            for parts in group.lines().map(|l| l.split(':').collect::<Vec<_>>()) {
                let member = parts.get(3).is_some_and(|list| {
                    !name.is_empty() && list.split(',').any(|m| m.trim() == name)
                });
                if member && let Some(gid) = parts.get(2).and_then(|g| g.parse().ok()) {
                    groups.push(gid);
                }
            }
        }
    }
    Ok((Credentials::of(uid, gid, groups), home))
}

/// The program of a process: looked for in PATH if its name has no slash.
pub fn request(container: &Container, process: &Process) -> Result<Request, Status> {
    let name = process.arguments.first().cloned().unwrap_or_default();
    let bytes =
        |list: &[String]| -> Vec<Vec<u8>> { list.iter().map(|s| s.clone().into_bytes()).collect() };
    let refuse = |code, reason: &str| {
        status(
            code,
            format!("container {}: exec: {name:?}: {reason}", container.name),
        )
    };
    let usable = |path: &str| -> Result<(), Errno> {
        let found = fs::resolve(container, process.cwd.as_bytes(), path.as_bytes(), true)?;
        let attributes = found.node.attributes()?;
        if !found.node.is_regular() || !process.credentials.may(&attributes, 1) {
            return Err(Errno::EACCES);
        }
        Ok(())
    };
    let path = if name.contains('/') {
        match usable(&name) {
            Ok(()) => name.clone(),
            Err(Errno::ENOENT | Errno::ENOTDIR) => {
                return Err(refuse(Code::NotFound, "no such file or directory"));
            }
            Err(Errno::EACCES) => {
                return Err(refuse(Code::PermissionDenied, "permission denied"));
            }
            Err(e) => return Err(failed(&format!("exec: {name:?}"), e)),
        }
    } else {
        let path = process
            .environment
            .iter()
            .find_map(|e| e.strip_prefix("PATH="))
            .unwrap_or(DEFAULT_PATH);
        let mut denied = false;
        let mut found = None;
        for dir in path.split(':') {
            let candidate = format!("{}/{name}", if dir.is_empty() { "." } else { dir });
            match usable(&candidate) {
                Ok(()) => {
                    found = Some(candidate);
                    break;
                }
                Err(Errno::EACCES) => denied = true,
                Err(_) => {}
            }
        }
        match (found, denied) {
            (Some(path), _) => path,
            (None, true) => return Err(refuse(Code::PermissionDenied, "permission denied")),
            (None, false) => {
                return Err(refuse(Code::NotFound, "executable file not found in PATH"));
            }
        }
    };
    Ok(Request {
        path: path.into_bytes(),
        arguments: bytes(&process.arguments),
        environment: bytes(&process.environment),
    })
}
