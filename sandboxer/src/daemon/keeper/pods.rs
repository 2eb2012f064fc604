//! The daemon's side: pods of one kind, those with keepers and those without.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::process::{Child, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bulkhead_protocol::client::{Client, ClientOptions, RpcError};
use bulkhead_protocol::frame::MAX_MESSAGE;
use bulkhead_protocol::rpc::{Code, Request, Status};
use prost::Message;
use tokio::net::UnixStream;
use tokio::task::AbortHandle;

use super::process::About;
use super::{Kept, LIFE, LOCK, READY, SOCKET};
use crate::daemon::config::{Config, Isolation};
use crate::daemon::controller::Controller;
use crate::daemon::grpc::{self, Call, Service};
use crate::daemon::metrics::{Source, Text};
use crate::daemon::pod::blocking;
use crate::daemon::program;
use crate::daemon::proto::{CONTROLLER, IdRequest};
use crate::daemon::sandbox::{Answer, Figure, Kind};
use crate::daemon::state::State;
use crate::daemon::task::check_id;
use crate::fsutil;

/// Longest complaint of a keeper that does not start.
const MAX_SAID: u64 = 4096;

/// A keeper that lives.
#[derive(Debug)]
struct Keeper {
    id: String,
    client: Client,
    /// Ours; `None`: of an earlier daemon.
    child: Mutex<Option<Child>>,
    /// Notices its end.
    watcher: Mutex<Option<AbortHandle>>,
}

/// The pods of one kind.
#[derive(Debug)]
pub struct Keepers<K: Kind> {
    /// Pods without a keeper: on threads of ours, or ended.
    own: Arc<Controller<K>>,
    kept: Kept,
    config: Arc<Config>,
    /// The file that it comes from.
    file: Option<PathBuf>,
    /// The host's mount namespace, if we have left it.
    mounts: Option<File>,
    alive: Mutex<HashMap<String, Arc<Keeper>>>,
    /// One start of a keeper at a time for each pod: asked for twice is no other.
    making: tokio::sync::Mutex<()>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<K: Kind> Keepers<K> {
    /// With the pods of an earlier daemon: those whose keepers live go on. Needs a tokio runtime.
    pub async fn new(
        own: Arc<Controller<K>>,
        kept: Kept,
        config: Arc<Config>,
        file: Option<PathBuf>,
        mounts: Option<File>,
    ) -> Arc<Self> {
        let keepers = Arc::new(Self {
            own,
            kept,
            config,
            file,
            mounts,
            alive: Mutex::default(),
            making: tokio::sync::Mutex::default(),
        });
        keepers.recover().await;
        keepers
    }

    async fn recover(self: &Arc<Self>) {
        let directory = self.own.kind().directory();
        let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
        for dir in entries.map(|e| e.path()) {
            let name = dir.file_name().unwrap_or_default().to_string_lossy();
            if is_kept(&dir) {
                match UnixStream::connect(dir.join(SOCKET)).await {
                    Ok(stream) => {
                        let keeper = self.keep(&name, stream, None);
                        // containerd's call to start it has broken, and it knows of no such pod.
                        if State::read(&dir).is_ok_and(|state| state.started.is_none()) {
                            tracing::info!(sandbox = %name, "was never started and is removed");
                            let keepers = Arc::clone(self);
                            tokio::spawn(async move { keepers.give_up(&keeper).await });
                        } else {
                            tracing::info!(sandbox = %name, "goes on with its keeper");
                        }
                        continue;
                    }
                    Err(error) => {
                        tracing::error!(sandbox = %name, %error, "its keeper does not answer");
                    }
                }
            }
            self.own.adopt(dir);
        }
    }

    fn keep(self: &Arc<Self>, id: &str, stream: UnixStream, child: Option<Child>) -> Arc<Keeper> {
        let options = ClientOptions {
            max_answer: MAX_MESSAGE,
            timeout: None,
        };
        let keeper = Arc::new(Keeper {
            id: id.to_owned(),
            client: Client::with_options(stream, options),
            child: Mutex::new(child),
            watcher: Mutex::default(),
        });
        lock(&self.alive).insert(id.to_owned(), Arc::clone(&keeper));
        let (keepers, watched) = (Arc::clone(self), Arc::clone(&keeper));
        let task = tokio::spawn(async move {
            let _ = watched
                .client
                .call_raw(request(LIFE, Vec::new()), None)
                .await;
            // A task of its own: what follows ends this one.
            tokio::spawn(async move { keepers.lost(&watched).await });
        });
        *lock(&keeper.watcher) = Some(task.abort_handle());
        keeper
    }

    fn kept(&self, id: &str) -> Option<Arc<Keeper>> {
        lock(&self.alive).get(id).cloned()
    }

    /// Takes it off the list; false if somebody else has.
    fn forget(&self, keeper: &Arc<Keeper>) -> bool {
        let mut alive = lock(&self.alive);
        let same = |other: &Arc<Keeper>| Arc::ptr_eq(other, keeper);
        if !alive.get(&keeper.id).is_some_and(same) {
            return false;
        }
        alive.remove(&keeper.id);
        true
    }

    /// Its pod has been removed: it ends once we have gone.
    fn released(&self, keeper: &Arc<Keeper>) {
        if self.forget(keeper) {
            if let Some(watcher) = lock(&keeper.watcher).take() {
                watcher.abort();
            }
            let child = lock(&keeper.child).take();
            // Not waited for here: our connection is still open.
            tokio::task::spawn_blocking(move || child.map(|mut child| child.wait()));
        }
    }

    /// Has its pod removed.
    async fn give_up(&self, keeper: &Arc<Keeper>) {
        let id = IdRequest {
            sandbox_id: keeper.id.clone(),
        };
        let request = request("Shutdown", id.encode_to_vec());
        match keeper.client.call_raw(request, None).await {
            Ok(_) => self.released(keeper),
            Err(error) => {
                tracing::error!(sandbox = keeper.id, %error, "its pod cannot be removed");
            }
        }
    }

    /// It has ended before its pod was removed: so has the pod.
    async fn lost(&self, keeper: &Arc<Keeper>) {
        let _making = self.making.lock().await;
        if !self.forget(keeper) {
            return;
        }
        tracing::error!(
            sandbox = keeper.id,
            "its keeper has ended, and the pod with it"
        );
        let child = lock(&keeper.child).take();
        let dir = self.own.kind().directory().join(&keeper.id);
        let own = Arc::clone(&self.own);
        let run_dir = self.config.run_dir.clone();
        let _ = blocking(move || {
            if let Some(mut child) = child {
                let _ = child.kill();
                let _ = child.wait();
            }
            own.adopt(dir);
            // What it kept for `vmmctl`.
            crate::rundir::clean_stale(&run_dir);
        })
        .await;
    }

    /// Starts a keeper. Asked for again, gives the one that is there.
    async fn make(self: &Arc<Self>, id: &str, namespace: &str) -> Answer<Arc<Keeper>> {
        let _making = self.making.lock().await;
        if let Some(keeper) = self.kept(id) {
            return Ok(keeper);
        }
        let max = self.own.kind().max_pods();
        if lock(&self.alive).len() >= max {
            let text = format!(
                "{max} sandboxes of {} exist; remove some",
                self.own.kind().name()
            );
            return Err(Status::new(Code::ResourceExhausted, text));
        }
        let about = About {
            kept: self.kept,
            namespace: namespace.to_owned(),
            id: id.to_owned(),
            config: self.file.clone(),
        };
        let failed =
            |e: io::Error| Status::new(Code::Internal, format!("keeper of sandbox {id}: {e}"));
        let mounts = match &self.mounts {
            Some(mounts) => Stdio::from(mounts.try_clone().map_err(failed)?),
            None => Stdio::null(),
        };
        let socket = self.own.kind().directory().join(id).join(SOCKET);
        let at = socket.clone();
        let launched = blocking(move || launch(&about, mounts, at))
            .await?
            .map_err(failed)?;
        let stream = UnixStream::connect(socket).await.map_err(failed)?;
        Ok(self.keep(id, stream, launched.taken()))
    }

    async fn dispatch(self: Arc<Self>, call: Call) -> Answer<Vec<u8>> {
        let method = call.path.rsplit('/').next().unwrap_or_default().to_owned();
        // The first field of every request.
        let id = IdRequest::decode(call.payload.as_ref())
            .map(|r| r.sandbox_id)
            .unwrap_or_default();
        let (mut keeper, mut made) = (self.kept(&id), false);
        if keeper.is_none()
            && method == "Create"
            && self.kept.isolation(&self.config) == Isolation::Process
            && !self.own.has(&id)
        {
            check_id("sandbox", &id)?;
            let namespace = match call.namespace.as_str() {
                "" => "k8s.io",
                name => name,
            };
            keeper = Some(self.make(&id, namespace).await?);
            made = true;
        }
        let Some(keeper) = keeper else {
            if !self.own.has(&id) {
                // Its keeper may have ended just now: the pod is ours in a moment.
                drop(self.making.lock().await);
            }
            return self.own.dispatch(call).await;
        };
        let answer = keeper
            .client
            .call_raw(request(&method, call.payload.to_vec()), None)
            .await;
        match answer {
            Ok(payload) => {
                if method == "Shutdown" {
                    self.released(&keeper);
                }
                Ok(payload)
            }
            Err(RpcError::Status { status, .. }) => {
                // What could not be made is not there; what could not be started has been removed.
                if method == "Start" || method == "Create" && made {
                    self.released(&keeper);
                }
                Err(status)
            }
            Err(RpcError::Closed { .. }) => {
                self.lost(&keeper).await;
                self.own.dispatch(call).await
            }
            Err(error) => Err(Status::new(Code::Internal, error.to_string())),
        }
    }

    /// Ends the pods that have no keepers.
    pub async fn end_all(&self) {
        self.own.end_all().await;
    }
}

fn request(method: &str, payload: Vec<u8>) -> Request {
    Request {
        service: CONTROLLER.to_owned(),
        method: method.to_owned(),
        payload,
        timeout_nano: 0,
        metadata: Vec::new(),
    }
}

/// Whether a keeper holds the lock of a pod's directory.
fn is_kept(dir: &Path) -> bool {
    let file = File::options().read(true).write(true).open(dir.join(LOCK));
    let locked = |file: File| {
        matches!(
            file.try_lock_shared(),
            Err(std::fs::TryLockError::WouldBlock)
        )
    };
    file.is_ok_and(locked)
}

/// A keeper that answers, and that nobody speaks to yet. If nobody will, because who asked for it has
/// gone meanwhile, it ends at once instead of when it has been lonely for long enough.
#[derive(Debug)]
struct Launched {
    child: Option<Child>,
    socket: PathBuf,
}

impl Launched {
    fn taken(mut self) -> Option<Child> {
        self.child.take()
    }
}

impl Drop for Launched {
    fn drop(&mut self) {
        let Some(mut child) = self.child.take() else {
            return;
        };
        // Without a pod, it ends and cleans up as soon as its only connection is closed.
        let asked = std::os::unix::net::UnixStream::connect(&self.socket).is_ok();
        let dir = self.socket.parent().map(Path::to_owned);
        let end = move || {
            if !asked {
                let _ = child.kill();
            }
            let _ = child.wait();
            if let (false, Some(dir)) = (asked, dir) {
                fsutil::remove_at_last(dir, fsutil::remove_dir);
            }
        };
        // Not waited for here: this may be one of the runtime's threads.
        let _ = std::thread::Builder::new().spawn(end);
    }
}

/// Starts a keeper and waits until it answers, at `socket`. Blocks.
fn launch(about: &About, mounts: Stdio, socket: PathBuf) -> io::Result<Launched> {
    // No code of ours runs between fork and exec, so this is a cheap vfork.
    let mut child = program::command()
        .args(about.arguments())
        .env_remove("NOTIFY_SOCKET")
        .env_remove("WATCHDOG_USEC")
        .stdin(mounts)
        .stdout(Stdio::piped())
        .spawn()?;
    let mut said = String::new();
    if let Some(out) = child.stdout.take() {
        let _ = BufReader::new(out.take(MAX_SAID)).read_line(&mut said);
    }
    if said.trim_end() == READY {
        let child = Some(child);
        return Ok(Launched { child, socket });
    }
    let _ = child.kill();
    let _ = child.wait();
    let reason = said.trim_end().trim_start_matches("error: ").to_owned();
    Err(io::Error::other(match reason.as_str() {
        "" => "it ended without a word".to_owned(),
        _ => reason,
    }))
}

impl<K: Kind> Source for Keepers<K> {
    fn add<'a>(&'a self, text: &'a mut Text) -> Pin<Box<dyn Future<Output = ()> + Send + 'a>> {
        Box::pin(async move {
            self.own.add(text).await;
            let count = lock(&self.alive).len();
            let count = f64::from(u32::try_from(count).unwrap_or(u32::MAX));
            let figure = Figure::gauge(
                "bulkhead_kept_pods",
                "Pods that have a keeper and outlive the daemon.",
                count,
            );
            text.add(&figure, &[("runtime", self.own.kind().name())]);
        })
    }
}

/// A type of its own so that calls can hold it.
#[derive(Debug)]
pub struct KeptEndpoint<K: Kind>(pub Arc<Keepers<K>>);

impl<K: Kind> Service for KeptEndpoint<K> {
    fn call(&self, call: Call) -> grpc::Answer {
        let keepers = Arc::clone(&self.0);
        Box::pin(keepers.dispatch(call))
    }
}
