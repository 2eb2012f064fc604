//! A pod that a test works with.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use super::containerd::Node;
use super::proto::{ContainerConfig, PodSandboxConfig};
use super::{Cri, container};
use crate::env::PATIENCE;

/// A pod that is removed when the test leaves.
#[derive(Debug)]
pub struct TestPod {
    /// The connection.
    pub cri: Cri,
    /// What it was made of.
    pub config: PodSandboxConfig,
    /// Its id; empty: somebody else removes it.
    pub id: String,
}

impl TestPod {
    /// Runs it.
    ///
    /// # Errors
    /// What containerd says.
    pub fn run(node: &Node, handler: &str, config: PodSandboxConfig) -> Result<Self> {
        let cri = node.cri(handler)?;
        let id = cri.run_pod(&config)?;
        Ok(Self { cri, config, id })
    }

    /// Makes and starts a container.
    ///
    /// # Errors
    /// What containerd says.
    pub fn start(&self, spec: &ContainerConfig) -> Result<String> {
        let c = self.cri.create(&self.id, &self.config, spec)?;
        self.cri.start(&c)?;
        Ok(c)
    }

    /// A container that does nothing.
    ///
    /// # Errors
    /// What containerd says.
    pub fn sleeper(&self, name: &str) -> Result<String> {
        self.start(&container(name, "busybox", &["sleep", "100000"]))
    }

    /// Runs a script in a container; its output, when it succeeds.
    ///
    /// # Errors
    /// It fails.
    pub fn sh(&self, c: &str, script: &str) -> Result<String> {
        let answer = self.cri.exec(c, &["sh", "-c", script])?;
        let text = |b: &[u8]| String::from_utf8_lossy(b).into_owned();
        ensure!(
            answer.exit_code == 0,
            "{script:?}: exit code {}: {} {}",
            answer.exit_code,
            text(&answer.stdout),
            text(&answer.stderr)
        );
        Ok(text(&answer.stdout))
    }

    /// Tries a script until its output contains `wanted`.
    ///
    /// # Errors
    /// It never does.
    pub fn until(&self, c: &str, script: &str, wanted: &str) -> Result<()> {
        let begin = Instant::now();
        loop {
            let last = self.cri.exec(c, &["sh", "-c", script])?;
            if String::from_utf8_lossy(&last.stdout).contains(wanted) {
                return Ok(());
            }
            ensure!(
                begin.elapsed() < PATIENCE,
                "{script:?} never says {wanted:?}: {last:?}"
            );
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Stops and removes it.
    ///
    /// # Errors
    /// What containerd says.
    pub fn remove(mut self) -> Result<()> {
        let id = std::mem::take(&mut self.id);
        self.cri.stop_pod(&id)?;
        self.cri.remove_pod(&id)
    }
}

impl Drop for TestPod {
    fn drop(&mut self) {
        if !self.id.is_empty() {
            let _ = self.cri.stop_pod(&self.id);
            let _ = self.cri.remove_pod(&self.id);
        }
    }
}
