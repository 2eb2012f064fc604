//! A running guest as the daemon sees it: its VM, and the connection to its agent.

use std::sync::Arc;
use std::time::Duration;

use bulkhead_protocol::CONTROL_PORT;
use bulkhead_protocol::sandbox::{AddEntropyRequest, ConfigureSandboxRequest};
use tokio::net::UnixStream;

use super::machine::Machine;
use crate::daemon::agent::link::{Clock, Dial, Link};
use crate::engine::EngineError;
use crate::engine::agent::failed;
use crate::timeouts;

/// First and longest pause between two attempts to reach an agent that is not listening yet.
const RETRY: (Duration, Duration) = (Duration::from_millis(1), Duration::from_millis(20));

/// A guest whose agent answers.
#[derive(Debug)]
pub struct Guest {
    vm: Machine,
    link: Arc<Link<VmWay>>,
}

/// The way to a guest's ports.
#[derive(Debug)]
pub struct VmWay(Machine);

impl Dial for VmWay {
    async fn dial(&self, port: u32) -> std::io::Result<UnixStream> {
        self.0.dial(port).await
    }
}

impl Guest {
    /// Waits until the agent of a started VM answers, and sets the sandbox up. A VM that is a copy
    /// takes `entropy` before that.
    ///
    /// # Errors
    /// The guest ends or does not answer in time, or refuses.
    pub async fn reach(
        vm: Machine,
        request: &ConfigureSandboxRequest,
        entropy: Option<&AddEntropyRequest>,
    ) -> Result<Self, EngineError> {
        let mut link = Self::link_to(&vm).await?;
        vm.mark("agent answers");
        if let Some(entropy) = entropy {
            let added = link.sandbox().add_entropy(entropy).await;
            added.map_err(failed("giving the guest random numbers of its own"))?;
        }
        link.configure(vm.id(), request, Clock::Guest).await?;
        vm.mark("configured");
        Ok(Self {
            vm,
            link: Arc::new(link),
        })
    }

    /// Waits until the agent of a started VM answers.
    ///
    /// # Errors
    /// The guest ends or does not answer in time.
    pub async fn link_to(vm: &Machine) -> Result<Link<VmWay>, EngineError> {
        let within = timeouts::boot();
        let attempts = async {
            let mut pause = RETRY.0;
            loop {
                if let Ok(stream) = vm.dial(CONTROL_PORT).await {
                    return stream;
                }
                // Refused: the kernel is up, the agent not yet.
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(RETRY.1);
            }
        };
        let ended = vm.ended()?;
        let stream = tokio::select! {
            stream = tokio::time::timeout(within, attempts) => match stream {
                Ok(stream) => stream,
                Err(_) => return Err(vm.hangs("waiting for the agent", within).await),
            },
            () = ended => return Err(vm.end_error("booting")),
        };
        Ok(Link::new(VmWay(vm.clone()), stream))
    }

    /// The connection to its agent.
    pub fn link(&self) -> &Arc<Link<VmWay>> {
        &self.link
    }

    /// The VM.
    pub fn vm(&self) -> &Machine {
        &self.vm
    }

    /// Asks the guest to go down, waits, and ends it if it does not heed that.
    pub async fn shut_down(&self, grace: Duration) {
        let asked = self.link.shut_down(grace);
        let orderly = async {
            let Ok(mut ended) = self.vm.ended() else {
                return asked.await;
            };
            // Its end may be known before its answer, or instead of it.
            tokio::select! {
                () = &mut ended => {}
                () = asked => ended.await,
            }
        };
        let _ = tokio::time::timeout(timeouts::shutdown() + grace, orderly).await;
        self.vm.stop();
    }
}
