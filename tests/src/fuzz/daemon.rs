//! What the daemon reads of others.

use std::cell::OnceCell;
use std::path::Path;

use bulkhead_protocol::rpc::{self, Request};
use bulkhead_protocol::task::{CreateTaskRequest, ExecProcessRequest, StateRequest};
use bulkhead_protocol::types::Any;
use bulkhead_sandboxer::daemon::fuzz::{self, Calls};
use bulkhead_sandboxer::daemon::proto::{
    CONTROLLER, CreateRequest, IdRequest, PodSandboxConfig, STREAM_INIT, STREAMING, StreamInit,
    UpdateRequest,
};
use bulkhead_sandboxer::daemon::worker::channel::Report;
use prost::Message;
use serde_json::json;

pub use fuzz::{
    fuzz_config as config, fuzz_report as report, fuzz_spec as spec, fuzz_state as state,
};

/// A directory of the target's own, for as long as it runs.
struct Own<T> {
    value: T,
    _dir: tempfile::TempDir,
}

fn own<T>(make: impl FnOnce(&Path) -> T) -> Own<T> {
    // In memory: the daemon syncs what it writes down.
    let dir = tempfile::Builder::new()
        .prefix("")
        .rand_bytes(5)
        .tempdir_in("/dev/shm")
        .expect("a directory in /dev/shm");
    Own {
        value: make(dir.path()),
        _dir: dir,
    }
}

thread_local! {
    static CALLS: OnceCell<Own<Calls>> = const { OnceCell::new() };
    static CACHE: OnceCell<Own<std::path::PathBuf>> = const { OnceCell::new() };
}

fn with_calls(use_them: impl FnOnce(&Calls)) {
    CALLS.with(|calls| {
        let made = calls.get_or_init(|| own(|dir| Calls::new(dir).expect("a runtime")));
        use_them(&made.value);
    });
}

pub fn controller(data: &[u8]) {
    with_calls(|calls| calls.controller(data));
}

pub fn http(data: &[u8]) {
    with_calls(|calls| calls.http(data));
}

pub fn task(data: &[u8]) {
    with_calls(|calls| calls.task(data));
}

pub fn wasm_cache(data: &[u8]) {
    CACHE.with(|cache| {
        let dir = cache.get_or_init(|| own(|dir| dir.join("cache")));
        bulkhead_wasm::fuzz_cache(data, &dir.value);
    });
}

pub fn wasm_cache_seeds() -> Vec<Vec<u8>> {
    vec![
        vec![0],
        vec![1],
        vec![0, 3, 0, 1],
        vec![1, 40, 0, 1],
        vec![128],
        b"\x80what the compiler made".to_vec(),
    ]
}

pub fn config_seeds() -> Vec<Vec<u8>> {
    let shipped = include_str!("../../../sandboxer/packaging/sandboxer.toml");
    let keys: String = shipped
        .lines()
        .filter(|line| !line.starts_with("# "))
        .map(|line| format!("{}\n", line.trim_start_matches('#')))
        .collect();
    vec![
        keys.into_bytes(),
        b"[microvm]\ndefault_cpus = 2\nisolation = \"process\"\n".to_vec(),
        b"run_dir = \"/run/x\"\n[metrics]\nlisten = \"unix:/run/m\"\n".to_vec(),
    ]
}

pub fn state_seeds() -> Vec<Vec<u8>> {
    let state = json!({
        "version": 1, "id": "p", "namespace": "k8s.io", "netns": "/run/netns/x", "pid": 7,
        "started": [5, 6], "cgroup_parent": "/kubepods/x", "cgroups": ["/sys/fs/cgroup/kubepods"],
        "containers": ["a", "b"],
    });
    vec![state.to_string().into_bytes()]
}

pub fn spec_seeds() -> Vec<Vec<u8>> {
    let spec = json!({
        "ociVersion": "1.1.0",
        "process": {
            "terminal": false, "user": {"uid": 1000, "gid": 100, "additionalGids": [5]},
            "args": ["/bin/sh", "-c", "true"], "env": ["PATH=/bin", "A=b"], "cwd": "/",
            "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024}],
            "capabilities": {"bounding": ["CAP_CHOWN"]}, "noNewPrivileges": true,
        },
        "root": {"path": "rootfs", "readonly": true},
        "hostname": "h",
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid"]},
            {"destination": "/data", "type": "bind", "source": "/dev/null", "options": ["rbind", "ro"]},
            {"destination": "/tmp", "type": "tmpfs", "source": "tmpfs", "options": ["size=65536k"]},
        ],
        "annotations": {"io.kubernetes.cri.container-type": "container"},
        "linux": {
            "namespaces": [{"type": "pid"}, {"type": "network", "path": "/run/netns/x"}, {"type": "mount"}],
            "devices": [{"path": "/dev/x", "type": "c", "major": 1, "minor": 3, "fileMode": 438, "uid": 0}],
            "resources": {
                "devices": [{"allow": false, "access": "rwm"}, {"allow": true, "type": "c", "major": 1, "minor": 3, "access": "rwm"}],
                "memory": {"limit": 1048576, "swap": 0}, "cpu": {"shares": 2, "quota": 10000, "period": 100000},
                "pids": {"limit": 10},
            },
            "maskedPaths": ["/proc/kcore"], "readonlyPaths": ["/proc/sys"], "sysctl": {"net.ipv4.ip_forward": "1"},
        },
    });
    let limits = json!({"memory": {"limit": 65536}, "cpu": {"quota": -1, "period": 0}});
    vec![
        spec.to_string().into_bytes(),
        limits.to_string().into_bytes(),
    ]
}

pub fn report_seeds() -> Vec<Vec<u8>> {
    let reports = [
        Report::Running,
        Report::Failed { reason: "x".into() },
        Report::Dialled {
            id: 1,
            error: Some((2, "no".into())),
        },
        Report::Ended {
            reason: "x".into(),
            tail: "y".into(),
        },
    ];
    let of_wasm = [
        json!("Ready"),
        json!({"Done": {"ask": 1, "refused": {"invalid": true, "text": "no"}}}),
        json!({"Uses": {"ask": 2, "usage": {
            "cpu_us": 1, "memory_bytes": 2, "memory_peak_bytes": 3,
            "memory_limit_bytes": 4, "memory_refused": 5, "instances": 6,
        }}}),
        json!({"Ended": {"program": 3, "ended": {
            "code": 7, "out_of_memory": false, "message": "x\n    at y",
        }}}),
    ];
    let of_vms = reports.iter().filter_map(|r| serde_json::to_vec(r).ok());
    let of_wasm = of_wasm.iter().map(|r| r.to_string().into_bytes());
    of_vms.chain(of_wasm).collect()
}

fn create() -> Vec<u8> {
    let options = Any {
        type_url: "runtime.v1.PodSandboxConfig".into(),
        value: PodSandboxConfig::default().encode_to_vec(),
    };
    let request = CreateRequest {
        sandbox_id: "p".into(),
        options: Some(options),
        netns_path: "/run/netns/none".into(),
        ..CreateRequest::default()
    };
    request.encode_to_vec()
}

fn named() -> Vec<u8> {
    let request = IdRequest {
        sandbox_id: "p".into(),
    };
    request.encode_to_vec()
}

pub fn controller_seeds() -> Vec<Vec<u8>> {
    let update = UpdateRequest {
        sandbox_id: "p".into(),
        ..UpdateRequest::default()
    };
    let call = |method: u8, payload: &[u8]| {
        let length = u16::try_from(payload.len())
            .unwrap_or(u16::MAX)
            .to_le_bytes();
        [&[method], &length[..], payload].concat()
    };
    let every = [1, 2, 3, 4, 6, 5]
        .map(|method| call(method, &named()))
        .concat();
    vec![
        [call(0, &create()), every].concat(),
        [call(0, &create()), call(7, &update.encode_to_vec())].concat(),
    ]
}

/// A connection of HTTP/2 (RFC 9113) with one gRPC call; names and values of fields as they are (RFC 7541
/// section 6.2.2).
pub fn http_seeds() -> Vec<Vec<u8>> {
    let frame = |kind: u8, flags: u8, stream: u32, payload: &[u8]| {
        let length = u32::try_from(payload.len()).unwrap_or(0).to_be_bytes();
        [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
    };
    let text = |text: &str| [&[u8::try_from(text.len()).unwrap_or(0)], text.as_bytes()].concat();
    let field = |name: &str, value: &str| [vec![0], text(name), text(value)].concat();
    let call = |stream: u32, method: &str, payload: &[u8]| {
        let head = [
            // POST, http.
            vec![0x83, 0x86, 0x04],
            text(&format!("/{CONTROLLER}/{method}")),
            field("content-type", "application/grpc"),
            field("containerd-namespace", "k8s.io"),
            field("grpc-timeout", "10S"),
        ];
        let length = u32::try_from(payload.len()).unwrap_or(0).to_be_bytes();
        let body = [&[0], &length[..], payload].concat();
        [
            frame(1, 4, stream, &head.concat()),
            frame(0, 1, stream, &body),
        ]
        .concat()
    };
    let begin = [
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec(),
        frame(4, 0, 0, &[]),
    ]
    .concat();
    vec![
        [
            begin.clone(),
            call(1, "Create", &create()),
            call(3, "Status", &named()),
        ]
        .concat(),
        [begin, call(1, "Metrics", &named())].concat(),
    ]
}

pub fn task_seeds() -> Vec<Vec<u8>> {
    let call = |stream: u32, service: &str, method: &str, payload: Vec<u8>| {
        let request = Request {
            service: service.into(),
            method: method.into(),
            payload,
            ..Request::default()
        };
        rpc::encode_request(stream, &request).unwrap_or_default()
    };
    let task = |stream, method, payload| call(stream, "containerd.task.v3.Task", method, payload);
    let made = CreateTaskRequest {
        id: "c".into(),
        bundle: "/run/none".into(),
        stdout: "/run/none/fifo".into(),
        ..CreateTaskRequest::default()
    };
    let exec = ExecProcessRequest {
        id: "c".into(),
        exec_id: "e".into(),
        ..ExecProcessRequest::default()
    };
    let state = StateRequest {
        id: "c".into(),
        ..StateRequest::default()
    };
    let init = Any {
        type_url: STREAM_INIT.into(),
        value: StreamInit { id: "s".into() }.encode_to_vec(),
    };
    vec![
        [
            task(1, "Create", made.encode_to_vec()),
            task(3, "State", state.encode_to_vec()),
            task(5, "Exec", exec.encode_to_vec()),
            task(7, "Pids", state.encode_to_vec()),
        ]
        .concat(),
        call(1, STREAMING, "Stream", init.encode_to_vec()),
    ]
}
