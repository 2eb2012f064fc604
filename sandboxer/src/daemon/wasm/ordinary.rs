//! Ordinary containers of a wasm pod, sidecars for example. They are made as those of
//! `bulkhead-process` are: by an agent on this host, in the pod's network and below its cgroup. It
//! is started when the first of them comes, so that a pod of wasm programs alone has no process.

use std::sync::Arc;
use std::time::Duration;

use bulkhead_protocol::rpc::{Code, Status};
use tokio::sync::{Mutex, watch};

use super::super::process::{ProcessSandbox, Processes};
use super::super::sandbox::{Answer, Kind, OwnEnd, Plan, Sandbox};

/// What a pod has of them.
#[derive(Debug)]
pub struct Ordinary {
    kind: Processes,
    plan: Plan,
    /// Taken down: nothing is started any more. Held while it is started.
    closed: Mutex<bool>,
    running: watch::Sender<Option<Arc<ProcessSandbox>>>,
}

fn has_ended() -> Status {
    Status::new(Code::FailedPrecondition, "the sandbox has ended")
}

impl Ordinary {
    /// Nothing yet.
    pub fn new(kind: Processes, plan: Plan) -> Self {
        Self {
            kind,
            plan,
            closed: Mutex::default(),
            running: watch::Sender::new(None),
        }
    }

    /// The sandbox they are in, if there is any of them.
    pub fn running(&self) -> Option<Arc<ProcessSandbox>> {
        self.running.borrow().clone()
    }

    /// The same for calls about one of them.
    ///
    /// # Errors
    /// It has ended.
    pub fn get(&self) -> Answer<Arc<ProcessSandbox>> {
        self.running().ok_or_else(has_ended)
    }

    /// The sandbox for them, started if this is the first.
    ///
    /// # Errors
    /// This pod cannot have ordinary containers; the text says why.
    pub async fn started(&self) -> Answer<Arc<ProcessSandbox>> {
        let closed = self.closed.lock().await;
        if *closed {
            return Err(has_ended());
        }
        if let Some(running) = self.running() {
            return Ok(running);
        }
        let in_wasm_pod = |text: &str| format!("ordinary container in a wasm pod: {text}");
        self.kind
            .check(&self.plan.wish)
            .map_err(|text| Status::new(Code::InvalidArgument, in_wasm_pod(&text)))?;
        let started = self.kind.start(self.plan.clone()).await.map_err(|status| {
            let code = Code::try_from(status.code).unwrap_or(Code::Internal);
            Status::new(code, in_wasm_pod(&status.message))
        })?;
        tracing::info!(
            sandbox = self.plan.id,
            "has ordinary containers from now on"
        );
        let started = Arc::new(started);
        self.running.send_replace(Some(Arc::clone(&started)));
        drop(closed);
        Ok(started)
    }

    /// Resolves when their agent has ended by itself, and so all of them.
    pub async fn ended(&self) -> OwnEnd {
        let mut running = self.running.subscribe();
        let sandbox = match running.wait_for(Option::is_some).await {
            Ok(found) => found.clone(),
            Err(_) => None,
        };
        match sandbox {
            Some(sandbox) => sandbox.ended().await,
            None => std::future::pending().await,
        }
    }

    /// Asks them to end.
    pub async fn shut_down(&self, grace: Duration) {
        if let Some(running) = self.running() {
            running.shut_down(grace).await;
        }
    }

    /// Ends them, and sees to it that no more come. Blocks.
    pub fn take_down(&self) {
        // One that is being started is waited for, so that nothing of it is left.
        *self.closed.blocking_lock() = true;
        if let Some(running) = self.running.send_replace(None) {
            running.take_down();
        }
    }
}
