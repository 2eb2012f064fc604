//! A running VM as the front sees it: calls about containers go to the guest's agent; files and
//! standard streams are joined here.

use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bulkhead_protocol::client::{RpcError, TaskClient};
use bulkhead_protocol::metrics::Metrics;
use bulkhead_protocol::rpc::{Code, Status};
use bulkhead_protocol::sandbox::{CONTAINER_OPTIONS_TYPE_URL, ContainerOptions};
use bulkhead_protocol::task::*;
use bulkhead_protocol::types::{Any, Mount};
use prost::Message;
use serde_json::Value;
use tokio::sync::Notify;
use tokio::task::AbortHandle;

use super::container_spec;
use super::debug_socket::DebugSocket;
use super::guest::{Guest, ended, refused};
use super::network::PodNetwork;
use super::portforward::PortForward;
use crate::daemon::cgroup::Threads;
use crate::daemon::events::now;
use crate::daemon::pod::blocking;
use crate::daemon::sandbox::{Answer, Exit, Figure, KILLED, Of, OwnEnd, Sandbox};
use crate::daemon::stdio::{GuestNames, Names, Places, Pumps};
use crate::daemon::storage::{Storage, StorageError};
use crate::daemon::streaming::Streams;
use crate::daemon::task::read_spec;
use crate::engine::Sandbox as _;
use crate::engine::microvm::MicroVm;
use crate::timeouts;

/// How much of the console is logged when a guest ends by itself, in bytes.
const LAST_WORDS: usize = 2048;

/// What a VM has on the host, in the order in which it is made.
#[derive(Debug, Default)]
pub struct Parts {
    /// Its files.
    pub storage: Option<Arc<Mutex<Storage>>>,
    /// Its network.
    pub network: Option<PodNetwork>,
    /// The VM.
    pub vm: Option<Arc<MicroVm>>,
    /// What serves its loopback.
    pub forward: Option<PortForward>,
    /// What serves `vmmctl`.
    pub debug: Option<DebugSocket>,
    /// What else runs for it.
    pub tasks: Vec<AbortHandle>,
    /// Where its threads are counted.
    pub threads: Option<Threads>,
}

impl Parts {
    /// Takes all of it away. Blocks: the VM's threads are waited for.
    pub fn take_down(self, guest: Option<Arc<Guest>>) {
        drop((self.forward, self.debug));
        for task in self.tasks {
            task.abort();
        }
        // It uses the rest.
        if let Some(vm) = &self.vm {
            vm.vm().stop();
        }
        drop((guest, self.vm));
        // It is empty by now.
        drop(self.threads);
        drop(self.storage);
        if let Some(network) = self.network {
            network.leave();
        }
    }
}

/// A running VM.
#[derive(Debug)]
pub struct VmSandbox {
    /// Until it is taken down: it holds the VM's devices.
    guest: Mutex<Option<Arc<Guest>>>,
    streams: Arc<Streams>,
    parts: Mutex<Parts>,
    /// Why we have ended it ourselves, if we have.
    given_up: Mutex<Option<String>>,
}

/// A process in the guest.
#[derive(Debug)]
pub struct VmProcess {
    /// What copies its standard streams, until they are dropped.
    pumps: Mutex<Option<Pumps>>,
    close_stdin: Arc<Notify>,
}

impl VmProcess {
    fn new(pumps: Pumps) -> Self {
        Self {
            close_stdin: pumps.close_stdin(),
            pumps: Mutex::new(Some(pumps)),
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn storage_failed(error: StorageError) -> Status {
    let code = match error {
        StorageError::Io { .. } => Code::Internal,
        StorageError::Unsupported(_) => Code::InvalidArgument,
        StorageError::Missing(_) => Code::NotFound,
    };
    Status::new(code, error.to_string())
}

#[expect(
    clippy::cast_precision_loss,
    reason = "Prometheus knows no other numbers"
)]
fn number(value: u64) -> f64 {
    value as f64
}

/// The end of a guest's console as one may log it: the guest is not trusted with control
/// characters, nor with filling the log.
fn last_words(tail: &[u8]) -> String {
    let start = tail.len().saturating_sub(LAST_WORDS);
    let text = String::from_utf8_lossy(tail.get(start..).unwrap_or_default()).into_owned();
    let clean = |c: &char| *c == '\n' || !c.is_control();
    text.chars()
        .filter(clean)
        .collect::<String>()
        .trim()
        .to_owned()
}

/// Whether an error of the agent means that what was to be deleted is not there.
fn gone(error: &RpcError) -> bool {
    error.code() == Some(Code::NotFound)
}

impl VmSandbox {
    /// A VM whose agent answers.
    pub(super) fn new(streams: Arc<Streams>, guest: Arc<Guest>, parts: Parts) -> Self {
        Self {
            guest: Mutex::new(Some(guest)),
            streams,
            parts: Mutex::new(parts),
            given_up: Mutex::default(),
        }
    }

    fn guest(&self) -> Answer<Arc<Guest>> {
        let guest = lock(&self.guest).clone();
        guest.ok_or_else(|| Status::new(Code::FailedPrecondition, "the sandbox has ended"))
    }

    fn tasks(&self) -> Answer<TaskClient> {
        Ok(self.guest()?.tasks())
    }

    /// Opens a process's streams in the guest and starts to copy.
    async fn open(&self, names: &Names) -> Answer<(Pumps, GuestNames)> {
        let guest = self.guest()?;
        let places = Places::parse(names, &self.streams)?;
        let open = async |wanted: bool| match wanted {
            true => guest.stream().await.map(Some),
            false => Ok(None),
        };
        let [stdin, stdout, stderr] = places.wanted();
        let (stdin, stdout, stderr) = tokio::try_join!(open(stdin), open(stdout), open(stderr))?;
        Ok(Pumps::between(places, [stdin, stdout, stderr]))
    }

    /// Tells those who look from outside. Blocks.
    fn show_container(&self, id: &str, bundle: Option<&str>) {
        if let Some(debug) = &mut lock(&self.parts).debug {
            debug.set_container(id, bundle.map(Into::into));
        }
    }

    fn storage(&self) -> Answer<Arc<Mutex<Storage>>> {
        lock(&self.parts)
            .storage
            .clone()
            .ok_or_else(|| Status::new(Code::FailedPrecondition, "the sandbox has ended"))
    }
}

impl Sandbox for VmSandbox {
    type Process = VmProcess;

    async fn ended(&self) -> OwnEnd {
        let reason = |reason: String| OwnEnd {
            reason,
            ..OwnEnd::default()
        };
        let Ok(guest) = self.guest() else {
            // Taken down: that is no end of its own.
            return std::future::pending().await;
        };
        let end = ended(guest.vm());
        drop(guest);
        match end {
            Ok(end) => end.await,
            Err(error) => return reason(error.to_string()),
        }
        if let Some(given_up) = lock(&self.given_up).take() {
            return reason(given_up);
        }
        let Ok(guest) = self.guest() else {
            return std::future::pending().await;
        };
        let vm = guest.vm();
        let words = last_words(&vm.vm().console_tail());
        OwnEnd {
            reason: vm.ended("running").to_string(),
            details: match words.is_empty() {
                true => words,
                false => format!("last words of the guest:\n{words}"),
            },
        }
    }

    async fn shut_down(&self, grace: Duration) {
        if let Ok(guest) = self.guest() {
            guest.shut_down(grace).await;
        }
    }

    fn take_down(&self) {
        let parts = std::mem::take(&mut *lock(&self.parts));
        let guest = lock(&self.guest).take();
        parts.take_down(guest);
    }

    fn info(&self) -> Option<String> {
        self.guest()
            .ok()?
            .vm()
            .inspect()
            .ok()
            .map(|vm| vm.to_string())
    }

    fn figures(&self) -> Vec<Figure> {
        let Ok(guest) = self.guest() else {
            return Vec::new();
        };
        let stats = guest.vm().vm().stats();
        let mut exits = [
            ("io_in", 0u64),
            ("io_out", 0),
            ("mmio_read", 0),
            ("mmio_write", 0),
            ("interrupted", 0),
            ("other", 0),
        ];
        for cpu in &stats.vcpus {
            let of_cpu = [
                cpu.io_in,
                cpu.io_out,
                cpu.mmio_read,
                cpu.mmio_write,
                cpu.interrupted,
                cpu.other,
            ];
            for ((_, sum), count) in exits.iter_mut().zip(of_cpu) {
                *sum = sum.saturating_add(count);
            }
        }
        let mut figures: Vec<Figure> = exits
            .into_iter()
            .map(|(reason, value)| Figure {
                label: Some(("reason", reason)),
                ..Figure::counter(
                    "bulkhead_vm_exits_total",
                    "Exits of a VM's CPUs to the daemon, by reason.",
                    number(value),
                )
            })
            .collect();
        if let Some(exits) = stats.kvm_vcpus.get("exits") {
            let help = "All exits of a VM's CPUs, those that the kernel serves included.";
            figures.push(Figure::counter(
                "bulkhead_vm_kvm_exits_total",
                help,
                number(*exits),
            ));
        }
        let help = "Guest memory that the host has given so far.";
        let resident = number(stats.memory_resident_bytes);
        figures.push(Figure::gauge("bulkhead_vm_resident_bytes", help, resident));
        if let Some(used) = lock(&self.parts).threads.as_ref().and_then(Threads::usage) {
            for (mode, value) in [("user", used.user), ("system", used.system)] {
                let help = "CPU time of a VM's threads on the host; user includes the guest.";
                figures.push(Figure {
                    label: Some(("mode", mode)),
                    ..Figure::counter("bulkhead_vm_cpu_seconds_total", help, value.as_secs_f64())
                });
            }
        }
        figures
    }

    async fn create(&self, request: &CreateTaskRequest) -> Answer<(VmProcess, u32)> {
        let storage = self.storage()?;
        let names = Names {
            stdin: request.stdin.clone(),
            stdout: request.stdout.clone(),
            stderr: request.stderr.clone(),
            terminal: request.terminal,
        };
        let (id, bundle) = (request.id.clone(), request.bundle.clone());
        let rootfs = request.rootfs.clone();
        let shares_pids = self.guest()?.shares_pids();
        let prepared = blocking(move || {
            let mut spec = read_spec(Path::new(&bundle))?;
            let binds = container_spec::rewrite(&mut spec, shares_pids)?;
            let mut storage = lock(&storage);
            let root = storage.add_root(&id, &rootfs).map_err(storage_failed)?;
            for bind in &binds {
                let path = storage
                    .add_volume(&id, Path::new(&bind.source), bind.access)
                    .map_err(storage_failed)?;
                container_spec::set_source(&mut spec, bind, path);
            }
            let spec = serde_json::to_vec(&spec)
                .map_err(|e| Status::new(Code::Internal, format!("container {id}: spec: {e}")))?;
            Ok::<_, Status>((root, spec))
        });
        let (root, oci_spec) = prepared.await??;
        let (pumps, guest_names) = self.open(&names).await?;
        let options = ContainerOptions {
            oci_spec,
            user: String::new(),
            sandbox_etc: true,
        };
        let to_agent = CreateTaskRequest {
            id: request.id.clone(),
            rootfs: vec![Mount {
                r#type: "bulkhead-share".into(),
                source: root,
                target: String::new(),
                options: vec!["rbind".into()],
            }],
            terminal: names.terminal,
            stdin: guest_names.stdin,
            stdout: guest_names.stdout,
            stderr: guest_names.stderr,
            options: Some(Any::of(CONTAINER_OPTIONS_TYPE_URL, &options)),
            ..CreateTaskRequest::default()
        };
        let made = self.tasks()?.create(&to_agent).await.map_err(refused)?;
        // A small file in memory.
        self.show_container(&request.id, Some(&request.bundle));
        Ok((VmProcess::new(pumps), made.pid))
    }

    fn discard(&self, container: &str) {
        self.show_container(container, None);
        if let Ok(storage) = self.storage() {
            lock(&storage).remove(container);
        }
    }

    async fn exec(&self, request: &ExecProcessRequest) -> Answer<VmProcess> {
        let names = Names {
            stdin: request.stdin.clone(),
            stdout: request.stdout.clone(),
            stderr: request.stderr.clone(),
            terminal: request.terminal,
        };
        let (pumps, guest_names) = self.open(&names).await?;
        let to_agent = ExecProcessRequest {
            stdin: guest_names.stdin,
            stdout: guest_names.stdout,
            stderr: guest_names.stderr,
            ..request.clone()
        };
        self.tasks()?.exec(&to_agent).await.map_err(refused)?;
        Ok(VmProcess::new(pumps))
    }

    async fn start(&self, _: &VmProcess, of: &Of) -> Answer<u32> {
        let request = StartRequest {
            id: of.container.clone(),
            exec_id: of.exec.clone(),
        };
        let answer = self.tasks()?.start(&request).await.map_err(refused)?;
        Ok(answer.pid)
    }

    async fn wait(&self, process: &VmProcess, of: &Of) -> Option<Exit> {
        let request = WaitRequest {
            id: of.container.clone(),
            exec_id: of.exec.clone(),
        };
        let tasks = self.tasks().ok()?;
        let exit = match tasks.wait(&request).await {
            Ok(answer) => Exit {
                status: answer.exit_status,
                at: answer.exited_at.unwrap_or_else(now),
            },
            // It was deleted.
            Err(e) if e.code().is_some() => Exit {
                status: KILLED,
                at: now(),
            },
            // The guest has gone: the end of the sandbox says so to all processes.
            Err(_) => return None,
        };
        let pumps = lock(&process.pumps).take();
        if let Some(mut pumps) = pumps {
            pumps.drained(timeouts::drain()).await;
            // What nobody has taken yet goes on being offered until the process is deleted.
            *lock(&process.pumps) = Some(pumps);
        }
        Some(exit)
    }

    async fn delete(&self, _: &VmProcess, of: &Of) -> Answer<()> {
        let request = DeleteRequest {
            id: of.container.clone(),
            exec_id: of.exec.clone(),
        };
        let Ok(tasks) = self.tasks() else {
            return Ok(());
        };
        match tasks.delete(&request).await {
            Ok(_) => Ok(()),
            Err(e) if gone(&e) || e.code().is_none() => Ok(()),
            Err(e) => Err(refused(e)),
        }
    }

    async fn kill(&self, _: &VmProcess, request: &KillRequest) -> Answer<()> {
        let guest = self.guest()?;
        let tasks = guest.tasks();
        let limit = timeouts::signal();
        if let Ok(answer) = tokio::time::timeout(limit, tasks.kill(request)).await {
            return answer.map(drop).map_err(refused);
        }
        // A guest that hangs must not hold up a stop for longer than its grace.
        let id = guest.vm().vm().id().to_owned();
        let seconds = limit.as_secs();
        if i32::try_from(request.signal).is_ok_and(|signal| signal == libc::SIGKILL) {
            let reason = format!(
                "the guest did not answer to SIGKILL for container {} within {seconds} s; its VM \
                 was ended",
                request.id
            );
            *lock(&self.given_up) = Some(reason);
            // Its end reaches all processes by the watch over it.
            return blocking(move || guest.vm().vm().stop()).await;
        }
        // Who sent it waits for the grace and then sends SIGKILL.
        tracing::warn!(
            sandbox = id,
            signal = request.signal,
            "the guest did not take a signal within {seconds} s"
        );
        Ok(())
    }

    async fn resize(&self, _: &VmProcess, request: &ResizePtyRequest) -> Answer<()> {
        let answer = self.tasks()?.resize_pty(request).await;
        answer.map(drop).map_err(refused)
    }

    async fn close_stdin(&self, process: &VmProcess) {
        // The pump does the rest, behind all that has been written.
        process.close_stdin.notify_one();
    }

    async fn pids(&self, container: &str) -> Answer<PidsResponse> {
        let id = container.to_owned();
        let answer = self.tasks()?.pids(&PidsRequest { id }).await;
        answer.map_err(refused)
    }

    async fn pause(&self, container: &str) -> Answer<()> {
        let id = container.to_owned();
        let answer = self.tasks()?.pause(&PauseRequest { id }).await;
        answer.map(drop).map_err(refused)
    }

    async fn resume(&self, container: &str) -> Answer<()> {
        let id = container.to_owned();
        let answer = self.tasks()?.resume(&ResumeRequest { id }).await;
        answer.map(drop).map_err(refused)
    }

    async fn update(&self, mut request: UpdateTaskRequest) -> Answer<()> {
        if let Some(any) = &mut request.resources {
            let mut resources: Value = serde_json::from_slice(&any.value).map_err(|e| {
                Status::new(
                    Code::InvalidArgument,
                    format!("resources are not JSON: {e}"),
                )
            })?;
            if let Some(resources) = resources.as_object_mut() {
                container_spec::strip_resources(resources);
            }
            any.value = serde_json::to_vec(&resources)
                .map_err(|e| Status::new(Code::Internal, e.to_string()))?;
        }
        let answer = self.tasks()?.update(&request).await;
        answer.map(drop).map_err(refused)
    }

    async fn stats(&self, container: &str) -> Answer<Metrics> {
        let id = container.to_owned();
        let answer = self.tasks()?.stats(&StatsRequest { id }).await;
        let stats = answer.map_err(refused)?.stats.unwrap_or_default();
        Metrics::decode(stats.value.as_slice()).map_err(|e| {
            let text = format!("container {container}: statistics of the guest: {e}");
            Status::new(Code::Internal, text)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn last_words_are_harmless() {
        let mut tail = vec![b'x'; 5000];
        tail.extend_from_slice(b"\n\x1b[2J\x07Kernel panic\r\n\xff");
        let words = last_words(&tail);
        assert!(words.len() <= LAST_WORDS + 3);
        assert!(words.ends_with("[2JKernel panic\n\u{fffd}"), "{words:?}");
        assert_eq!(last_words(b""), "");
    }
}
