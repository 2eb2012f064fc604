//! What a container's OCI spec means for a wasm program.

use std::path::{Path, PathBuf};

use bulkhead_protocol::rpc::{Code, Status};
use bulkhead_wasm::User;
use serde_json::Value;

/// Mounts a container may have.
const MAX_MOUNTS: usize = 1000;
/// Arguments and variables together.
const MAX_STRINGS: usize = 10_000;

/// A directory or file of the host in the container's tree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bind {
    /// On the host.
    pub source: PathBuf,
    /// In the container.
    pub destination: PathBuf,
    /// It cannot be written.
    pub read_only: bool,
}

/// How the program is to be run.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Wish {
    /// The file to run, in the container's tree.
    pub program: PathBuf,
    /// The function named behind `#`, unless it is the usual one.
    pub function: Option<String>,
    /// Arguments, the program's name first.
    pub args: Vec<String>,
    /// Environment.
    pub env: Vec<(String, String)>,
    /// Working directory.
    pub cwd: String,
    /// As whom it has files; `None`: root.
    pub user: Option<User>,
    /// Its volumes.
    pub binds: Vec<Bind>,
    /// The image cannot be written.
    pub read_only: bool,
    /// Most memory in bytes.
    pub memory_bytes: Option<u64>,
    /// CPU share in thousandths.
    pub cpu_milli: Option<u32>,
}

fn invalid(text: impl Into<String>) -> Status {
    Status::new(Code::InvalidArgument, text)
}

fn strings(value: &Value) -> Result<Vec<String>, Status> {
    let list = value.as_array().map(Vec::as_slice).unwrap_or_default();
    if list.len() > MAX_STRINGS {
        return Err(invalid(format!(
            "more than {MAX_STRINGS} arguments or variables"
        )));
    }
    Ok(list
        .iter()
        .filter_map(|v| v.as_str().map(str::to_owned))
        .collect())
}

/// What a container is to run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// The file, in the container's tree.
    pub program: PathBuf,
    /// The function named behind `#`, unless it is the usual one.
    pub function: Option<String>,
    /// The file as it was named.
    name: String,
    cwd: String,
}

impl Entry {
    /// Its name says that it is a wasm program.
    pub fn is_named_wasm(&self) -> bool {
        self.name.ends_with(".wasm")
    }
}

/// Reads what the container is to run.
///
/// # Errors
/// Nothing.
pub fn entry(spec: &Value) -> Result<Entry, Status> {
    let process = &spec["process"];
    let first = process["args"].get(0).and_then(Value::as_str);
    let Some(first) = first.filter(|name| !name.is_empty()) else {
        return Err(invalid("the container names no program"));
    };
    let (name, function) = match first.rsplit_once('#') {
        // runwasi writes the default out.
        Some((name, "_start")) => (name, None),
        Some((name, function)) if !function.is_empty() => (name, Some(function.to_owned())),
        _ => (first, None),
    };
    let cwd = match process["cwd"].as_str() {
        None | Some("") => "/",
        Some(cwd) => cwd,
    };
    Ok(Entry {
        // An absolute one replaces the directory.
        program: Path::new(cwd).join(name),
        function,
        name: name.to_owned(),
        cwd: cwd.to_owned(),
    })
}

/// Reads the spec of a wasm program.
///
/// # Errors
/// It asks for what a wasm program cannot have.
pub fn read(spec: &Value) -> Result<Wish, Status> {
    let process = &spec["process"];
    let Entry {
        program,
        function,
        name,
        cwd,
    } = entry(spec)?;
    let mut args = strings(&process["args"])?;
    if let Some(first) = args.first_mut() {
        *first = name;
    }
    let env = strings(&process["env"])?
        .into_iter()
        .filter_map(|v| {
            let (key, value) = v.split_once('=')?;
            Some((key.to_owned(), value.to_owned()))
        })
        .collect();
    let resources = &spec["linux"]["resources"];
    Ok(Wish {
        program,
        function,
        env,
        cwd,
        user: user(&process["user"])?,
        binds: binds(spec)?,
        read_only: spec["root"]["readonly"] == true,
        memory_bytes: memory(resources),
        cpu_milli: cpu(resources),
        args,
    })
}

/// Number of a user or group.
fn number(value: &Value) -> Result<u32, Status> {
    let missing = value.is_null();
    let number = value.as_u64().and_then(|n| u32::try_from(n).ok());
    match number.filter(|n| *n != u32::MAX) {
        Some(number) => Ok(number),
        None if missing => Ok(0),
        None => Err(invalid(format!("{value} is no number of a user or group"))),
    }
}

/// The user of an OCI process. Names were looked up by containerd, in the image.
fn user(value: &Value) -> Result<Option<User>, Status> {
    let groups = value["additionalGids"].as_array().map(Vec::as_slice);
    let groups = groups.unwrap_or_default();
    if groups.len() > MAX_STRINGS {
        return Err(invalid(format!("more than {MAX_STRINGS} groups")));
    }
    let user = User {
        uid: number(&value["uid"])?,
        gid: number(&value["gid"])?,
        groups: groups.iter().map(number).collect::<Result<_, _>>()?,
    };
    // Root has all files whatever its groups; what it makes is its main group's.
    Ok((user.uid != 0 || user.gid != 0).then_some(user))
}

/// Limits that are to be changed: memory in bytes and CPU in thousandths of a core, each only if it
/// is named, and `None` in it for no limit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Limits {
    /// Most memory.
    pub memory_bytes: Option<Option<u64>>,
    /// CPU share.
    pub cpu_milli: Option<Option<u32>>,
}

/// Reads OCI resources that a running program is to be held to from now on.
///
/// # Errors
/// They are not JSON.
pub fn limits(resources: &[u8]) -> Result<Limits, Status> {
    let resources: Value = serde_json::from_slice(resources)
        .map_err(|e| invalid(format!("resources are not JSON: {e}")))?;
    let named = |value: &Value| value.as_i64().is_some_and(|n| n != 0);
    Ok(Limits {
        memory_bytes: named(&resources["memory"]["limit"]).then(|| memory(&resources)),
        cpu_milli: named(&resources["cpu"]["quota"]).then(|| cpu(&resources)),
    })
}

/// The memory limit of OCI resources, in bytes.
fn memory(resources: &Value) -> Option<u64> {
    let limit = resources["memory"]["limit"].as_i64()?;
    u64::try_from(limit).ok().filter(|l| *l > 0)
}

/// The CPU quota of OCI resources, in thousandths of a core.
fn cpu(resources: &Value) -> Option<u32> {
    let quota = resources["cpu"]["quota"].as_i64()?;
    let period = resources["cpu"]["period"].as_i64().unwrap_or(100_000);
    milli(quota, period)
}

/// A quota per period as thousandths of a core; `None` is no limit.
pub fn milli(quota: i64, period: i64) -> Option<u32> {
    if quota <= 0 || period <= 0 {
        return None;
    }
    let milli = quota.saturating_mul(1000).checked_div(period)?;
    Some(u32::try_from(milli.max(1)).unwrap_or(u32::MAX))
}

fn binds(spec: &Value) -> Result<Vec<Bind>, Status> {
    let list = spec["mounts"]
        .as_array()
        .map(Vec::as_slice)
        .unwrap_or_default();
    if list.len() > MAX_MOUNTS {
        return Err(invalid(format!("more than {MAX_MOUNTS} mounts")));
    }
    let mut binds = Vec::new();
    for mount in list {
        let options = mount["options"].as_array();
        let has = |option: &str| options.is_some_and(|all| all.iter().any(|o| o == option));
        let destination = mount["destination"].as_str().unwrap_or_default();
        if mount["type"] != "bind" && !has("bind") && !has("rbind") {
            // proc, sysfs, /dev, mqueue, cgroup: what WASI has no idea of.
            continue;
        }
        if mount.get("uidMappings").is_some_and(|m| !m.is_null()) {
            return Err(invalid(format!(
                "mount at {destination}: idmapped mounts are not supported in a wasm sandbox"
            )));
        }
        let source = mount["source"].as_str().unwrap_or_default();
        if destination == "/dev/shm" {
            // Shared memory of processes: a program of WASI has none.
            continue;
        }
        if !source.starts_with('/') || !destination.starts_with('/') {
            return Err(invalid(format!(
                "mount of {source:?} at {destination:?}: both must be absolute paths"
            )));
        }
        binds.push(Bind {
            source: source.into(),
            destination: destination.into(),
            read_only: has("ro") || has("rro"),
        });
    }
    Ok(binds)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_spec_of_cri_is_understood() {
        let spec = json!({
            "process": {"args": ["app.wasm#add", "x"], "env": ["A=b=c", "bad"], "cwd": "/srv"},
            "root": {"readonly": true},
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc"},
                {"destination": "/dev/shm", "type": "bind", "source": "/run/x/shm", "options": ["rbind"]},
                {"destination": "/data", "type": "bind", "source": "/v", "options": ["rbind", "ro"]},
            ],
            "linux": {"resources": {"memory": {"limit": 1024}, "cpu": {"quota": 50_000, "period": 100_000}}},
        });
        let wish = read(&spec).expect("read");
        assert_eq!(wish.program, Path::new("/srv/app.wasm"));
        assert_eq!(wish.function.as_deref(), Some("add"));
        assert_eq!(wish.args, ["app.wasm", "x"]);
        assert_eq!(wish.env, [("A".to_owned(), "b=c".to_owned())]);
        assert_eq!((wish.memory_bytes, wish.cpu_milli), (Some(1024), Some(500)));
        assert!(wish.read_only);
        assert_eq!(wish.binds.len(), 1);
        assert!(wish.binds[0].read_only);
    }

    #[test]
    fn changed_limits_are_those_that_are_named() {
        let read = |text: &str| limits(text.as_bytes()).expect("read");
        assert_eq!(read("{}"), Limits::default());
        let text = r#"{"memory": {"limit": 4096}, "cpu": {"shares": 2, "quota": 0}}"#;
        let memory = Limits {
            memory_bytes: Some(Some(4096)),
            cpu_milli: None,
        };
        assert_eq!(read(text), memory);
        let text = r#"{"cpu": {"quota": 150000, "period": 100000}, "memory": {"limit": -1}}"#;
        let both = Limits {
            memory_bytes: Some(None),
            cpu_milli: Some(Some(1500)),
        };
        assert_eq!(read(text), both);
        assert!(limits(b"{").is_err());
    }

    #[test]
    fn no_limit_is_none() {
        let wish = read(&json!({
            "process": {"args": ["/x.wasm#_start"]},
            "linux": {"resources": {"memory": {"limit": -1}, "cpu": {"quota": -1}}},
        }))
        .expect("read");
        assert_eq!((wish.memory_bytes, wish.cpu_milli), (None, None));
        assert_eq!((wish.function, wish.cwd.as_str()), (None, "/"));
        assert!(read(&json!({})).is_err());
        assert_eq!(milli(i64::MAX, 1), Some(u32::MAX));
    }

    #[test]
    fn the_name_tells_wasm_programs() {
        let of = |arg: &str| entry(&json!({"process": {"args": [arg], "cwd": "/app"}}));
        let named = |arg: &str| of(arg).expect("read").is_named_wasm();
        assert!(named("/x.wasm") && named("x.wasm#run") && named("x.wasm#_start"));
        assert!(!named("/bin/sh") && !named("app#run") && !named("/x.wasm/sh"));
        let app = of("app#run").expect("read");
        assert_eq!(app.program, Path::new("/app/app"));
        assert_eq!(app.function.as_deref(), Some("run"));
        assert!(of("").is_err() && entry(&json!({"process": {"args": [7]}})).is_err());
    }

    proptest::proptest! {
        #[test]
        fn any_spec_is_answered(text in "[a-z/\\[\\]{}\":,0-9]{0,200}") {
            let mounts: Value = serde_json::from_str(&text).unwrap_or(json!([text]));
            let _ = read(&json!({"process": {"args": [text]}, "mounts": mounts}));
            let _ = read(&mounts);
        }
    }
}
