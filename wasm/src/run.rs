//! Runs one container's program to its end, on a thread of its pod.

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use wasmtime::component::Val as ComponentVal;
use wasmtime::{Store, WasmCoreDump};
use wasmtime_wasi::filesystem::WasiFilesystemCtx;
use wasmtime_wasi::{I32Exit, WasiCtxBuilder, WasiView};

use crate::config::{MAX_RANDOM_BYTES, MAX_RESOURCES};
use crate::exit::Exit;
use crate::http;
use crate::pod::{ContainerConfig, ContainerInner};
use crate::program::Code;
use crate::state::{self, Common, ComponentState, CoreState};
use crate::stdio::{Direction, Input, Output, Stream};

/// How long what a program wrote last may wait for its reader after the program's end.
const LAST_WORDS: Duration = Duration::from_secs(30);

/// What every instance of a container is made of.
pub(crate) struct Setup {
    pub(crate) inner: Arc<ContainerInner>,
    pub(crate) config: ContainerConfig,
    files: WasiFilesystemCtx,
    stdin: Input,
    pub(crate) stdout: Output,
    pub(crate) stderr: Output,
}

impl Setup {
    /// A WASI context of its own for each instance.
    fn wasi(&self) -> WasiCtxBuilder {
        let mut builder = WasiCtxBuilder::new();
        builder
            .args(&self.config.args)
            .envs(&self.config.env)
            .stdin(self.stdin.clone())
            .stdout(self.stdout.clone())
            .stderr(self.stderr.clone())
            .allow_blocking_current_thread(true)
            .max_random_size(MAX_RANDOM_BYTES);
        if let Some(cwd) = &self.config.cwd {
            builder.initial_cwd(cwd);
        }
        if self.has_network() {
            // The calling thread is in the pod's network namespace: that is the boundary. Names
            // are not asked from the host's library but by our own resolver (see `link`).
            builder
                .inherit_network()
                .allow_tcp(true)
                .allow_udp(true)
                .allow_ip_name_lookup(false);
        }
        builder
    }

    fn has_network(&self) -> bool {
        self.config.sockets && self.inner.pod.threads.has_network()
    }

    fn common(&self) -> Common {
        Common::new(&self.inner.usage, &self.inner.control)
    }

    pub(crate) fn core_store(&self) -> wasmtime::Result<Store<CoreState>> {
        let mut wasi = self.wasi().build_p1();
        *wasi.ctx().ctx.filesystem() = self.files.clone();
        wasi.ctx().table.set_max_capacity(MAX_RESOURCES);
        let state = CoreState {
            wasi,
            common: self.common(),
        };
        state::store(&self.config.program.0.engine, state, self.config.fuel)
    }

    pub(crate) fn component_store(&self) -> wasmtime::Result<Store<ComponentState>> {
        let mut wasi = self.wasi().build();
        *wasi.filesystem() = self.files.clone();
        let state = ComponentState::new(
            wasi,
            self.common(),
            Arc::clone(&self.inner.pod.resolver),
            self.has_network(),
        );
        state::store(&self.config.program.0.engine, state, self.config.fuel)
    }

    /// Runs guest code: counted as executing while it does, and ended when it must be.
    pub(crate) async fn guarded<F, T>(&self, limit: Option<Duration>, work: F) -> Result<T, Exit>
    where
        F: Future<Output = T>,
    {
        let control = &self.inner.control;
        control.runnable().await;
        let work = self.inner.pod.engine.0.ticker.count(work);
        let timed = async {
            match limit {
                None => Some(work.await),
                Some(limit) => tokio::time::timeout(limit, work).await.ok(),
            }
        };
        tokio::select! {
            biased;
            signal = control.killed() => Err(Exit::signal(signal)),
            done = timed => done.ok_or_else(Exit::deadline),
        }
    }

    /// Writes the core of a program that trapped, if anybody wants it.
    fn dump<T: 'static, R>(
        &self,
        store: &mut Store<T>,
        called: wasmtime::Result<R>,
    ) -> wasmtime::Result<R> {
        use std::io::Write;
        if let Err(error) = &called
            && let Some(mut file) = self.config.core_dump.as_ref()
            && error.downcast_ref::<I32Exit>().is_none()
            && let Some(core) = error.downcast_ref::<WasmCoreDump>()
        {
            let core = core.serialize(&mut *store, self.config.program.name());
            if let Err(e) = file.write_all(&core) {
                let text = format!("the core dump is incomplete: {e}\n");
                self.stderr.log(&text);
            }
        }
        called
    }

    fn exit_of(&self, error: &wasmtime::Error, instantiated: bool) -> Exit {
        if let Some(signal) = self.inner.control.signal() {
            return Exit::signal(signal);
        }
        let starved = self.inner.usage.out_of_memory.load(Ordering::Acquire);
        Exit::of_error(error, starved, instantiated)
    }
}

/// Runs the container. Never fails: what goes wrong is its exit.
pub(crate) async fn container(
    inner: &Arc<ContainerInner>,
    config: ContainerConfig,
    files: WasiFilesystemCtx,
) -> Exit {
    let _cpu = inner.control.cpu.attach();
    let setup = match prepare(inner, config, files) {
        Ok(setup) => Arc::new(setup),
        Err(exit) => return exit,
    };
    let exit = match &setup.config.program.0.code {
        Code::Http(_) | Code::HttpP3(_) if setup.config.function.is_none() => {
            let serving = http::serve(&setup);
            tokio::pin!(serving);
            let over = async {
                match setup.config.deadline {
                    Some(limit) => tokio::time::sleep(limit).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                exit = &mut serving => exit,
                () = over => {
                    inner.control.kill(9);
                    inner.pod.engine.interrupt();
                    serving.await;
                    Exit::deadline()
                }
            }
        }
        _ => {
            let deadline = setup.config.deadline;
            setup
                .guarded(deadline, once(&setup))
                .await
                .unwrap_or_else(|exit| exit)
        }
    };
    // What was written is delivered, even if its reader is slow; a signal ends that too.
    let last = async {
        for stream in [&setup.stdout, &setup.stderr] {
            if let Some(stream) = &stream.0 {
                let _ = stream.drain().await;
            }
        }
    };
    tokio::select! {
        () = last => {}
        _ = setup.inner.control.killed() => {}
        () = tokio::time::sleep(LAST_WORDS) => {}
    }
    exit
}

fn prepare(
    inner: &Arc<ContainerInner>,
    mut config: ContainerConfig,
    files: WasiFilesystemCtx,
) -> Result<Setup, Exit> {
    let core = matches!(config.program.0.code, Code::Core(_));
    let stream = |stdio, direction, what| {
        Stream::new(stdio, direction, core)
            .map_err(|e| Exit::failed(format!("standard {what}: {e}")))
    };
    let stdin = stream(std::mem::take(&mut config.stdin), Direction::In, "input")?;
    let stdout = stream(std::mem::take(&mut config.stdout), Direction::Out, "output")?;
    let stderr = stream(std::mem::take(&mut config.stderr), Direction::Out, "error")?;
    Ok(Setup {
        inner: Arc::clone(inner),
        config,
        files,
        stdin: Input(stdin),
        stdout: Output(stdout),
        stderr: Output(stderr),
    })
}

/// Runs a program that is not a server.
async fn once(setup: &Setup) -> Exit {
    let mut instantiated = false;
    let result = match &setup.config.program.0.code {
        Code::Core(pre) => core(setup, pre, &mut instantiated).await,
        Code::Command(pre) => match &setup.config.function {
            None => command(setup, pre, &mut instantiated).await,
            Some(function) => named(setup, pre.instance_pre(), function, &mut instantiated).await,
        },
        Code::CommandP3(pre) => match &setup.config.function {
            None => command_p3(setup, pre, &mut instantiated).await,
            Some(function) => named(setup, pre.instance_pre(), function, &mut instantiated).await,
        },
        Code::Component(pre) => {
            let function = setup.config.function.as_deref().unwrap_or_default();
            named(setup, pre, function, &mut instantiated).await
        }
        Code::Http(pre) => {
            let function = setup.config.function.as_deref().unwrap_or_default();
            named(setup, pre.instance_pre(), function, &mut instantiated).await
        }
        Code::HttpP3(pre) => {
            let function = setup.config.function.as_deref().unwrap_or_default();
            named(setup, pre.instance_pre(), function, &mut instantiated).await
        }
    };
    match result {
        Ok(code) => Exit::code(code),
        Err(error) => setup.exit_of(&error, instantiated),
    }
}

async fn core(
    setup: &Setup,
    pre: &wasmtime::InstancePre<CoreState>,
    instantiated: &mut bool,
) -> wasmtime::Result<u8> {
    let mut store = setup.core_store()?;
    let instance = pre.instantiate_async(&mut store).await?;
    *instantiated = true;
    let name = setup.config.function.as_deref().unwrap_or("_start");
    // A reactor is made ready before any of its functions is called.
    if name != "_start"
        && name != "_initialize"
        && let Some(initialize) = instance.get_func(&mut store, "_initialize")
    {
        initialize.call_async(&mut store, &[], &mut []).await?;
    }
    let function = instance
        .get_func(&mut store, name)
        .ok_or_else(|| wasmtime::Error::msg(format!("no function {name:?}")))?;
    let ty = function.ty(&store);
    if ty.params().len() != 0 {
        *instantiated = false;
        return Err(wasmtime::Error::msg(format!(
            "function {name:?} takes {} parameters; only functions without can be run",
            ty.params().len()
        )));
    }
    let mut results = vec![wasmtime::Val::I32(0); ty.results().len()];
    let called = function.call_async(&mut store, &[], &mut results).await;
    setup.dump(&mut store, called)?;
    Ok(0)
}

async fn command(
    setup: &Setup,
    pre: &wasmtime_wasi::p2::bindings::CommandPre<ComponentState>,
    instantiated: &mut bool,
) -> wasmtime::Result<u8> {
    let mut store = setup.component_store()?;
    let command = pre.instantiate_async(&mut store).await?;
    *instantiated = true;
    let called = command.wasi_cli_run().call_run(&mut store).await;
    let result = setup.dump(&mut store, called)?;
    Ok(u8::from(result.is_err()))
}

async fn command_p3(
    setup: &Setup,
    pre: &wasmtime_wasi::p3::bindings::CommandPre<ComponentState>,
    instantiated: &mut bool,
) -> wasmtime::Result<u8> {
    let mut store = setup.component_store()?;
    let command = pre.instantiate_async(&mut store).await?;
    *instantiated = true;
    let called = store
        .run_concurrent(async |accessor| command.wasi_cli_run().call_run(accessor).await)
        .await
        .and_then(|called| called);
    let result = setup.dump(&mut store, called)?;
    Ok(u8::from(result.is_err()))
}

/// Calls a function of a component by its name.
async fn named(
    setup: &Setup,
    pre: &wasmtime::component::InstancePre<ComponentState>,
    name: &str,
    instantiated: &mut bool,
) -> wasmtime::Result<u8> {
    let mut store = setup.component_store()?;
    let instance = pre.instantiate_async(&mut store).await?;
    let function = instance
        .get_func(&mut store, name)
        .ok_or_else(|| wasmtime::Error::msg(format!("{name:?} is not a function")))?;
    let ty = function.ty(&store);
    if ty.params().len() != 0 {
        return Err(wasmtime::Error::msg(format!(
            "function {name:?} takes {} parameters; only functions without can be run",
            ty.params().len()
        )));
    }
    *instantiated = true;
    let mut results = vec![ComponentVal::Bool(false); ty.results().len()];
    let called = function.call_async(&mut store, &[], &mut results).await;
    setup.dump(&mut store, called)?;
    Ok(u8::from(matches!(
        results.first(),
        Some(ComponentVal::Result(Err(_)))
    )))
}

impl Setup {
    /// Writes down why a request failed.
    pub(crate) fn request_failed(&self, failed: &http::Failed) -> Exit {
        let exit = self.exit_of(&failed.error, failed.instantiated);
        if let Some(message) = &exit.message {
            self.stderr.log(&format!("request failed: {message}\n"));
        }
        exit
    }
}
