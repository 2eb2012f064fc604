//! Entry points for fuzzing what reads bytes that others wrote: the configuration, what is written
//! down of pods, a container's spec, a worker's reports, and the calls of containerd's connections.
//! No input may panic, hang or take much memory. Nothing is started: kernel and image of the
//! controller behind [`Calls`] are not there.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bulkhead_protocol::rpc::{Code, Status};
use bulkhead_protocol::server::TaskDispatch;
use prost::Message;
use serde::de::DeserializeOwned;
use serde_json::Value;
use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;

use super::config::Config;
use super::controller::{Controller, Endpoint};
use super::events::Events;
use super::grpc::{self, Call, Service};
use super::state::State;
use super::task::Tasks;
use super::vm::guests::Guests;
use super::vm::{Vms, container_spec};
use super::worker::channel::{Channel, Report};
use super::{proto, ttrpc, wasm};

/// Longest wait for the answer to one call: calls that wait for a pod's end are given up then.
const ANSWER: Duration = Duration::from_millis(1);

/// Any bytes as the configuration.
pub fn fuzz_config(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let _ = Config::read(&text, Path::new("fuzzed.toml")).map_err(|e| e.to_string());
}

/// Any bytes as what is written down of a pod.
pub fn fuzz_state(data: &[u8]) {
    if let Ok(state) = State::parse(data) {
        super::cgroup::missing(&state.cgroup_parent);
    }
}

/// Any bytes as a container's spec, and as new limits for it.
pub fn fuzz_spec(data: &[u8]) {
    let _ = wasm::spec::limits(data);
    let Ok(spec) = serde_json::from_slice::<Value>(data) else {
        return;
    };
    let _ = wasm::spec::entry(&spec);
    let _ = wasm::spec::read(&spec);
    for shares_pids in [false, true] {
        let mut spec = spec.clone();
        if let Ok(wanted) = container_spec::rewrite(&mut spec, shares_pids) {
            let binds: Vec<_> = wanted.binds.into_iter().map(|b| (b, (8, 1))).collect();
            container_spec::make_devices(&mut spec, &binds);
        }
    }
}

/// Any bytes as what a worker reports to the daemon: one of a VM, and one of wasm programs.
///
/// # Panics
/// A message was taken for two.
pub fn fuzz_report(data: &[u8]) {
    look_at::<Report>(data);
    look_at::<super::wasm::jailed::message::Report>(data);
}

fn look_at<M: DeserializeOwned>(data: &[u8]) {
    let Ok((daemon, worker)) = Channel::pair() else {
        return;
    };
    let sent = nix::sys::socket::send(
        std::os::fd::AsRawFd::as_raw_fd(&worker),
        data,
        nix::sys::socket::MsgFlags::MSG_DONTWAIT,
    );
    drop(worker);
    if sent == Ok(data.len()) && !data.is_empty() {
        let _ = daemon.look::<M>();
    }
    assert!(matches!(daemon.look::<M>(), Ok(None)));
}

/// A controller whose pods cannot start, behind containerd's protocols.
#[derive(Debug)]
pub struct Calls {
    runtime: tokio::runtime::Runtime,
    controller: Arc<Controller<Vms>>,
}

/// Everything but what makes network, cgroups and VMs.
struct Unstarted(Endpoint<Vms>);

impl Service for Unstarted {
    fn call(&self, call: Call) -> grpc::Answer {
        if call.path.ends_with("/Start") {
            let status = Status::new(Code::Unimplemented, "nothing starts here");
            return Box::pin(async { Err(status) });
        }
        let answer = self.0.call(call);
        Box::pin(async move {
            tokio::time::timeout(ANSWER, answer)
                .await
                .unwrap_or_else(|_| Err(Status::new(Code::DeadlineExceeded, "given up")))
        })
    }
}

/// A call of the sandbox controller.
fn call(method: &str, payload: &[u8]) -> Call {
    Call {
        path: format!("{}/{method}", proto::CONTROLLER),
        namespace: "k8s.io".into(),
        payload: bytes::Bytes::copy_from_slice(payload),
    }
}

impl Calls {
    /// With what is written down in a directory.
    ///
    /// # Errors
    /// What the host says.
    pub fn new(run_dir: &Path) -> io::Result<Self> {
        let mut config = Config {
            run_dir: run_dir.to_owned(),
            containerd_ttrpc: run_dir.join("none"),
            ..Config::default()
        };
        config.microvm.templates = 0;
        config.microvm.kernel = Some(run_dir.join("none"));
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let events = {
            let _inside = runtime.enter();
            Events::start(config.containerd_ttrpc.clone())
        };
        let vms = Vms::new(Arc::new(config), Guests::Linux);
        let controller = Controller::empty(vms, events);
        Ok(Self {
            runtime,
            controller,
        })
    }

    /// Calls of the sandbox controller, one after the other: for each a byte that chooses the method,
    /// two of the length of what follows, and the encoded argument.
    pub fn controller(&self, data: &[u8]) {
        const METHODS: [&str; 9] = [
            "Create", "Platform", "Stop", "Wait", "Status", "Shutdown", "Metrics", "Update", "None",
        ];
        let service = Unstarted(Endpoint(Arc::clone(&self.controller)));
        let mut rest = data;
        while let Some(([method, low, high], tail)) = rest.split_first_chunk() {
            let len = usize::from(u16::from_le_bytes([*low, *high])).min(tail.len());
            let (payload, after) = tail.split_at(len);
            rest = after;
            let method = METHODS
                .get(usize::from(*method) % METHODS.len())
                .unwrap_or(&"None");
            let _ = self.runtime.block_on(service.call(call(method, payload)));
        }
        self.forget();
    }

    /// A connection to the sandbox controller, as its bytes.
    pub fn http(&self, data: &[u8]) {
        let service = Arc::new(Unstarted(Endpoint(Arc::clone(&self.controller))));
        self.serve(data, move |stream| async move {
            let _ = grpc::serve(stream, service).await;
        });
        self.forget();
    }

    /// A connection to the Task service and the streams of a pod that has not started, as its bytes.
    pub fn task(&self, data: &[u8]) {
        let request = proto::CreateRequest {
            sandbox_id: "fuzzed".into(),
            ..proto::CreateRequest::default()
        };
        let create = call("Create", &request.encode_to_vec());
        let _ = self.runtime.block_on(self.controller.dispatch(create));
        for pod in self.controller.all() {
            let streams = Arc::clone(&pod.streams);
            let dispatch = Arc::new(TaskDispatch(Arc::new(Tasks(pod))));
            self.serve(data, move |stream| async move {
                let _ = ttrpc::serve(stream, dispatch, streams).await;
            });
        }
        self.forget();
    }

    /// One connection that sends bytes and reads what comes, and goes away.
    fn serve<F>(&self, data: &[u8], serve: impl FnOnce(UnixStream) -> F)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        self.runtime.block_on(async {
            let Ok((ours, theirs)) = UnixStream::pair() else {
                return;
            };
            let mut serving = tokio::spawn(serve(theirs));
            let (mut from, mut to) = ours.into_split();
            let reader = tokio::spawn(async move {
                let _ = tokio::io::copy(&mut from, &mut tokio::io::sink()).await;
            });
            let _ = to.write_all(data).await;
            drop(to);
            // Streams that nobody has claimed are waited for a while, calls until they are answered.
            if tokio::time::timeout(ANSWER, &mut serving).await.is_err() {
                reader.abort();
                serving.abort();
            }
        });
    }

    /// Removes all pods.
    fn forget(&self) {
        for pod in self.controller.all() {
            let request = proto::IdRequest {
                sandbox_id: pod.id.clone(),
            };
            let shutdown = call("Shutdown", &request.encode_to_vec());
            let _ = self.runtime.block_on(self.controller.dispatch(shutdown));
        }
        assert!(self.controller.all().is_empty(), "pods are left");
    }
}
