//! A containerd and a sandboxer of the tests' own, in directories that are fresh in the lab. Needs
//! root, cgroup v2, and nobody else's containerd.

use std::fs::{self, File};
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::Cri;
use crate::env::{PATIENCE, built};
use crate::process::Guard;

/// Handler of our runtime.
pub const OURS: &str = "bulkhead-microvm";
/// Handler of our runtime for pods on the app kernel.
pub const APP: &str = "bulkhead-app";
/// Handler of our runtime for wasm pods.
pub const WASM: &str = "bulkhead-wasm";
/// Runtime of pods of ordinary containers.
pub const PROCESS: &str = "bulkhead-process";
/// Pods in VMs with images of containerd's erofs snapshotter.
pub const EROFS: &str = "erofs";
/// The same on the app kernel.
pub const APP_EROFS: &str = "app-erofs";
/// Where its sandboxer serves figures.
pub const METRICS: &str = "/run/cri-test/metrics.sock";
/// Where everything is.
const DIR: &str = "/run/cri-test";
const SOCKET: &str = "/run/containerd/containerd.sock";
const PAUSE: &str = "localhost/bulkhead/pause:latest";

/// How containerd passes standard streams on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IoType {
    /// By FIFOs.
    Fifo,
    /// By streams on the sandbox's own socket.
    Streaming,
}

/// Where VMs of a node run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Isolation {
    /// On threads of the sandboxer.
    Thread,
    /// In a jailed process each.
    Process,
}

/// Who the pods of a node are for.
#[derive(Debug, Clone, Copy)]
pub enum Purpose<'a> {
    /// Tests that name the runtime of each pod.
    Tests,
    /// A suite that names none, so that all its pods have this one; it also wants ports of the host
    /// mapped.
    Suite(&'a str),
}

/// A node.
#[derive(Debug)]
pub struct Node {
    containerd: Option<Guard>,
    sandboxer: Option<Guard>,
    program: PathBuf,
    /// How its containers' output is passed on.
    pub io: IoType,
    isolation: Isolation,
}

impl Node {
    /// Starts the daemons and imports images.
    ///
    /// # Errors
    /// Something does not start; the logs say why.
    pub fn start(sandboxer: &Path, images: &[&str], io: IoType) -> Result<Self> {
        Self::start_for(Purpose::Tests, sandboxer, images, io)
    }

    /// The same with VMs elsewhere.
    ///
    /// # Errors
    /// Something does not start; the logs say why.
    pub fn start_isolated(
        isolation: Isolation,
        sandboxer: &Path,
        images: &[&str],
        io: IoType,
    ) -> Result<Self> {
        Self::start_with(Purpose::Tests, isolation, "", sandboxer, images, io)
    }

    /// The same with more lines for `[microvm]` in the daemon's configuration.
    ///
    /// # Errors
    /// Something does not start; the logs say why.
    pub fn start_tuned(
        microvm: &str,
        sandboxer: &Path,
        images: &[&str],
        io: IoType,
    ) -> Result<Self> {
        let isolation = Isolation::Thread;
        Self::start_with(Purpose::Tests, isolation, microvm, sandboxer, images, io)
    }

    /// The same for another purpose.
    ///
    /// # Errors
    /// Something does not start; the logs say why.
    pub fn start_for(
        purpose: Purpose<'_>,
        sandboxer: &Path,
        images: &[&str],
        io: IoType,
    ) -> Result<Self> {
        Self::start_with(purpose, Isolation::Thread, "", sandboxer, images, io)
    }

    fn start_with(
        purpose: Purpose<'_>,
        isolation: Isolation,
        microvm: &str,
        sandboxer: &Path,
        images: &[&str],
        io: IoType,
    ) -> Result<Self> {
        // Logs are appended to: those of an earlier node would be taken for this one's.
        let _ = fs::remove_dir_all(at("logs"));
        for dir in ["", "logs", "cni", "cni-bin", "bin", "certs.d"] {
            fs::create_dir_all(Path::new(DIR).join(dir))?;
        }
        // One program for all our runtimes, as the package has it.
        let shim = built(&format!("containerd-shim-{OURS}-v1"))?;
        for name in [OURS, APP, WASM, PROCESS] {
            let link = at(&format!("bin/containerd-shim-{name}-v1"));
            let _ = fs::remove_file(&link);
            std::os::unix::fs::symlink(&shim, link)?;
        }
        let (mut config, mut cni) = (config(io), cni());
        if let Purpose::Suite(handler) = purpose {
            config.push_str(&format!(
                "[plugins.'io.containerd.cri.v1.runtime'.containerd]\n\
                 default_runtime_name = \"{handler}\"\n"
            ));
            let ports = json!({"type": "portmap", "capabilities": {"portMappings": true}});
            let plugins = cni["plugins"].as_array_mut().context("plugins")?;
            plugins.push(ports);
        }
        fs::write(at("config.toml"), config)?;
        fs::write(at("cni/10-bridge.conflist"), serde_json::to_string(&cni)?)?;
        let place = isolation;
        let isolation = match isolation {
            Isolation::Thread => "thread",
            Isolation::Process => "process",
        };
        fs::write(
            at("sandboxer.toml"),
            format!(
                "[log]\nlevel = \"info\"\n\
                 [microvm]\ndefault_memory_mib = 192\nisolation = \"{isolation}\"\n\
                 {microvm}\n\
                 [app]\nisolation = \"{isolation}\"\n\
                 [wasm]\nisolation = \"{isolation}\"\n\
                 [metrics]\nlisten = \"unix:{METRICS}\"\n"
            ),
        )?;
        let mut node = Self {
            containerd: None,
            sandboxer: None,
            program: sandboxer.to_owned(),
            io,
            isolation: place,
        };
        node.start_sandboxer()?;
        node.start_containerd()?;
        for image in images {
            node.import(image)?;
        }
        node.import_pause()?;
        Ok(node)
    }

    /// Where its sandboxes run.
    pub fn isolation(&self) -> Isolation {
        self.isolation
    }

    /// Starts containerd (again).
    ///
    /// # Errors
    /// It does not answer in time.
    pub fn start_containerd(&mut self) -> Result<()> {
        // It looks for the runtimes' shims there.
        let shims = at("bin");
        let path = std::env::var("PATH").unwrap_or_default();
        let child = Command::new("containerd")
            .args(["--config", &at("config.toml")])
            .env("PATH", format!("{path}:{shims}"))
            .stdin(Stdio::null())
            .stdout(log("containerd.log")?)
            .stderr(log("containerd.log")?)
            .spawn()
            .context("containerd")?;
        self.containerd = Some(Guard(child));
        self.wait_for("containerd", |_| {
            Cri::connect(Path::new(SOCKET), OURS)?.ready()
        })
    }

    /// Starts the sandboxer (again).
    ///
    /// # Errors
    /// It does not answer in time.
    pub fn start_sandboxer(&mut self) -> Result<()> {
        self.start_sandboxer_with(&[])
    }

    /// The same with more variables in its environment.
    ///
    /// # Errors
    /// It does not answer in time.
    pub fn start_sandboxer_with(&mut self, variables: &[(&str, &str)]) -> Result<()> {
        let child = Command::new(&self.program)
            .args(["--config", &at("sandboxer.toml")])
            .envs(variables.iter().copied())
            .stdin(Stdio::null())
            .stdout(log("sandboxer.log")?)
            .stderr(log("sandboxer.log")?)
            .spawn()
            .with_context(|| self.program.display().to_string())?;
        self.sandboxer = Some(Guard(child));
        self.wait_for("sandboxer", |_| {
            std::os::unix::net::UnixStream::connect("/run/bulkhead/microvm.sock")?;
            Ok(())
        })
    }

    fn wait_for(&mut self, what: &str, ready: impl Fn(&Self) -> Result<()>) -> Result<()> {
        let begin = Instant::now();
        loop {
            let error = match ready(self) {
                Ok(()) => return Ok(()),
                Err(error) => error,
            };
            let child = match what {
                "containerd" => &mut self.containerd,
                _ => &mut self.sandboxer,
            };
            let ended = match child {
                Some(guard) => guard.0.try_wait()?,
                None => None,
            };
            if ended.is_some() || begin.elapsed() > crate::env::PATIENCE {
                bail!(
                    "{what} is not ready ({ended:?}): {error:#}\n{}",
                    self.logs()
                );
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// A client.
    ///
    /// # Errors
    /// containerd has gone.
    pub fn cri(&self, handler: &str) -> Result<Cri> {
        Cri::connect(Path::new(SOCKET), handler)
    }

    /// Where its files are, and what runs on it finds its directory by.
    pub const DIRECTORY: (&str, &str) = ("BULKHEAD_NODE", DIR);

    /// Process of the sandboxer.
    pub fn sandboxer_pid(&self) -> u32 {
        self.sandboxer.as_ref().map_or(0, |g| g.0.id())
    }

    /// Waits until no VM is in the making that pods are to be copies of.
    ///
    /// # Errors
    /// It takes too long.
    pub fn templates_made(&self) -> Result<()> {
        let begin = Instant::now();
        while Path::new("/run/bulkhead/template").exists() {
            ensure!(begin.elapsed() < PATIENCE, "a template takes too long");
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(())
    }

    /// Starts what a failed test has left dead.
    ///
    /// # Errors
    /// A daemon does not start.
    pub fn ensure_running(&mut self) -> Result<()> {
        let dead = |guard: &mut Option<Guard>| match guard {
            Some(guard) => guard.0.try_wait().map(|ended| ended.is_some()),
            None => Ok(true),
        };
        if dead(&mut self.sandboxer)? {
            self.start_sandboxer()?;
        }
        if dead(&mut self.containerd)? {
            self.start_containerd()?;
        }
        Ok(())
    }

    /// Kills the sandboxer without a warning.
    pub fn kill_sandboxer(&mut self) {
        self.sandboxer = None;
    }

    /// Kills containerd without a warning.
    pub fn kill_containerd(&mut self) {
        self.containerd = None;
    }

    /// Ends the sandboxer by SIGTERM and waits for it.
    ///
    /// # Errors
    /// It does not end.
    pub fn terminate_sandboxer(&mut self) -> Result<()> {
        let Some(mut guard) = self.sandboxer.take() else {
            return Ok(());
        };
        terminate(&mut guard.0)
    }

    /// The ends of the logs, for failures.
    pub fn logs(&self) -> String {
        let mut out = String::new();
        for name in ["sandboxer.log", "containerd.log"] {
            let text = fs::read_to_string(at(name)).unwrap_or_default();
            let lines: Vec<&str> = text
                .lines()
                .filter(|l| !l.contains("level=info msg=\"loading plugin"))
                .collect();
            let from = lines.len().saturating_sub(40);
            out.push_str(&format!("--- {name}\n{}\n", lines[from..].join("\n")));
        }
        out
    }

    /// Lets images be pulled from a registry that speaks plain HTTP.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn allow_plain_http(&self, registry: SocketAddr) -> Result<()> {
        let dir = PathBuf::from(at(&format!("certs.d/{registry}")));
        fs::create_dir_all(&dir)?;
        let text = format!(
            "server = \"http://{registry}\"\n\
             [host.\"http://{registry}\"]\n  capabilities = [\"pull\", \"resolve\"]\n"
        );
        Ok(fs::write(dir.join("hosts.toml"), text)?)
    }

    /// Puts another plugin, a script, behind the one that makes pods' networks; `None`: takes it
    /// away. containerd notices by itself, soon.
    ///
    /// # Errors
    /// The files cannot be written.
    pub fn chain_cni(&self, script: Option<&str>) -> Result<()> {
        let file = at("cni/00-chained.conflist");
        let Some(script) = script else {
            return Ok(fs::remove_file(file)?);
        };
        let program = at("cni-bin/chained");
        fs::write(&program, script)?;
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755))?;
        let mut conf = cni();
        let plugins = conf["plugins"].as_array_mut().context("plugins")?;
        plugins.push(json!({"type": "chained"}));
        // Not by a rename: containerd looks again when a file is written, not when one appears.
        Ok(fs::write(file, serde_json::to_string(&conf)?)?)
    }

    /// containerd's own command, in CRI's namespace.
    ///
    /// # Errors
    /// It fails; with what it says.
    pub fn ctr(&self, args: &[&str]) -> Result<String> {
        let output = Command::new("ctr")
            .args(["--address", SOCKET, "--namespace", "k8s.io"])
            .args(args)
            .output()
            .context("ctr")?;
        if !output.status.success() {
            bail!("ctr {args:?}: {}", String::from_utf8_lossy(&output.stderr));
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    fn import(&self, name: &str) -> Result<()> {
        let image = bulkhead_fixtures::find_image(name)?
            .with_context(|| format!("image {name} is missing: run `just fixtures`"))?;
        let tar = image.oci_tar.display().to_string();
        self.ctr(&["images", "import", "--all-platforms", &tar])
            .map(drop)
    }

    /// runc wants an image whose program sleeps for ever: busybox's, with another command.
    fn import_pause(&self) -> Result<()> {
        let image = bulkhead_fixtures::find_image("busybox")?.context("busybox is missing")?;
        let layout = PathBuf::from(at("pause"));
        let _ = fs::remove_dir_all(&layout);
        let status = Command::new("cp")
            .arg("-a")
            .arg(&image.layout)
            .arg(&layout)
            .status()?;
        if !status.success() {
            bail!("copying {} failed", image.layout.display());
        }
        let read = |path: &Path| -> Result<Value> { Ok(serde_json::from_slice(&fs::read(path)?)?) };
        let blob = |digest: &str| layout.join("blobs").join(digest.replace(':', "/"));
        let store = |value: &Value| -> Result<(String, usize)> {
            let text = serde_json::to_vec(value)?;
            let digest = format!("sha256:{:x}", Sha256::digest(&text));
            fs::write(blob(&digest), &text)?;
            Ok((digest, text.len()))
        };
        let mut index = read(&layout.join("index.json"))?;
        let digest = index["manifests"][0]["digest"].as_str().context("digest")?;
        let mut manifest = read(&blob(digest))?;
        let digest = manifest["config"]["digest"].as_str().context("digest")?;
        let mut image_config = read(&blob(digest))?;
        image_config["config"]["Entrypoint"] = json!(["/bin/sleep"]);
        image_config["config"]["Cmd"] = json!(["1000000"]);
        let (digest, size) = store(&image_config)?;
        manifest["config"]["digest"] = json!(digest);
        manifest["config"]["size"] = json!(size);
        let (digest, size) = store(&manifest)?;
        let entry = &mut index["manifests"][0];
        entry["digest"] = json!(digest);
        entry["size"] = json!(size);
        entry["annotations"] = json!({
            "io.containerd.image.name": PAUSE,
            "org.opencontainers.image.ref.name": "latest",
        });
        fs::write(layout.join("index.json"), serde_json::to_vec(&index)?)?;
        let tar = at("pause.tar");
        let status = Command::new("tar")
            .args(["-C", &layout.display().to_string(), "-cf", &tar, "."])
            .status()?;
        if !status.success() {
            bail!("tar failed");
        }
        self.ctr(&["images", "import", "--all-platforms", &tar])
            .map(drop)
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        // containerd first: it would wait for the sandboxer.
        for guard in [&mut self.containerd, &mut self.sandboxer]
            .into_iter()
            .flatten()
        {
            let _ = terminate(&mut guard.0);
        }
    }
}

/// SIGTERM, and waiting.
fn terminate(child: &mut Child) -> Result<()> {
    let pid = nix::unistd::Pid::from_raw(i32::try_from(child.id())?);
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM)?;
    let begin = Instant::now();
    while child.try_wait()?.is_none() {
        if begin.elapsed() > crate::env::PATIENCE {
            bail!("process {pid} ignores SIGTERM");
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

fn at(name: &str) -> String {
    format!("{DIR}/{name}")
}

fn log(name: &str) -> Result<File> {
    Ok(File::options().create(true).append(true).open(at(name))?)
}

fn config(io: IoType) -> String {
    let io = match io {
        IoType::Fifo => "fifo",
        IoType::Streaming => "streaming",
    };
    let plugins = ["/usr/lib/cni", "/opt/cni/bin"]
        .into_iter()
        .find(|dir| Path::new(dir).join("bridge").exists())
        .unwrap_or("/opt/cni/bin");
    let mut text = format!(
        r#"version = 3
root = "/var/lib/containerd"
state = "/run/containerd"
[debug]
  level = "info"
[plugins.'io.containerd.cri.v1.images']
  snapshotter = "overlayfs"
  stats_collect_period = 3600
[plugins.'io.containerd.cri.v1.images'.pinned_images]
  sandbox = "{PAUSE}"
[plugins.'io.containerd.cri.v1.images'.registry]
  config_path = "{DIR}/certs.d"
[plugins.'io.containerd.cri.v1.runtime']
  disable_apparmor = true
[plugins.'io.containerd.cri.v1.runtime'.cni]
  bin_dirs = ["{plugins}", "{DIR}/cni-bin"]
  conf_dir = "{DIR}/cni"
  max_conf_num = 1
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]
  runtime_type = "io.containerd.runc.v2"
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.crun]
  runtime_type = "io.containerd.runc.v2"
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.crun.options]
  BinaryName = "/usr/bin/crun"
"#
    );
    for (name, socket) in [
        (OURS, "microvm"),
        (APP, "app"),
        (WASM, "wasm"),
        (PROCESS, "process"),
    ] {
        let in_sandbox = name != PROCESS;
        text.push_str(&format!(
            r#"[proxy_plugins.{name}]
  type = "sandbox"
  address = "/run/bulkhead/{socket}.sock"
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.{name}]
  runtime_type = "io.containerd.{name}.v1"
  sandboxer = "{name}"
  io_type = "{io}"
  privileged_without_host_devices = {in_sandbox}
"#
        ));
    }
    for (handler, name) in [(EROFS, OURS), (APP_EROFS, APP)] {
        text.push_str(&format!(
            r#"[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.{handler}]
  runtime_type = "io.containerd.{name}.v1"
  sandboxer = "{name}"
  io_type = "{io}"
  snapshotter = "erofs"
"#
        ));
    }
    // Makes images of layers for the snapshotter that wants them, and of no other's.
    text.push_str(
        "[plugins.'io.containerd.service.v1.diff-service']\n  default = ['erofs', 'walking']\n",
    );
    text
}

fn cni() -> Value {
    json!({
        "cniVersion": "1.0.0",
        "name": "cri-test",
        "plugins": [{
            "type": "bridge",
            "bridge": "critest0",
            "isGateway": true,
            "ipMasq": false,
            "hairpinMode": true,
            "ipam": {
                "type": "host-local",
                "dataDir": at("ipam"),
                "ranges": [[{"subnet": "10.77.0.0/16"}], [{"subnet": "fd77::/64"}]],
                "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}],
            },
        }],
    })
}
