//! The engine: compiles, caches and links programs, and keeps the clock that interrupts them.

use std::collections::HashMap;
use std::fmt;
use std::fs::File;
use std::hash::{Hash, Hasher};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use sha2::{Digest, Sha256};
use wasmtime::component::Component;
use wasmtime::{Config, InstanceAllocationStrategy, Module, PoolingAllocationConfig};

use crate::cache::{DiskCache, Sha, read_limited};
use crate::config::{self, Allocation, EngineConfig};
use crate::error::{WasmError, one_line};
use crate::link;
use crate::program::{self, Format, Loaded, Origin, Program, Source};
use crate::state::{ComponentState, CoreState};
use crate::ticker::Ticker;

/// One engine for all pods of a process. Cheap to clone.
#[derive(Clone)]
pub struct Engine(pub(crate) Arc<Inner>);

pub(crate) struct Inner {
    pub(crate) wasmtime: wasmtime::Engine,
    pub(crate) ticker: Ticker,
    // Made when first needed: a process that runs one module needs one of them.
    core_linker: OnceLock<wasmtime::Linker<CoreState>>,
    component_linker: OnceLock<wasmtime::component::Linker<ComponentState>>,
    cache: Option<DiskCache>,
    max_module_bytes: u64,
    pub(crate) fuel: bool,
    pub(crate) core_dumps: bool,
    /// What besides the program decides about its code.
    configuration: Vec<u8>,
    loaded: Mutex<LoadedPrograms>,
}

/// Programs in this process, the least recently used thrown out first.
#[derive(Default)]
struct LoadedPrograms {
    limit: usize,
    clock: u64,
    by_digest: HashMap<Sha, (u64, Arc<Loaded>)>,
}

impl LoadedPrograms {
    fn get(&mut self, digest: &Sha) -> Option<Arc<Loaded>> {
        self.clock += 1;
        let (used, loaded) = self.by_digest.get_mut(digest)?;
        *used = self.clock;
        Some(Arc::clone(loaded))
    }

    fn put(&mut self, digest: Sha, loaded: &Arc<Loaded>) {
        self.clock += 1;
        self.by_digest
            .insert(digest, (self.clock, Arc::clone(loaded)));
        while self.by_digest.len() > self.limit {
            let oldest = self
                .by_digest
                .iter()
                .min_by_key(|(_, (used, _))| *used)
                .map(|(digest, _)| *digest);
            match oldest {
                Some(digest) => self.by_digest.remove(&digest),
                None => return,
            };
        }
    }
}

impl fmt::Debug for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Engine")
            .field("cache", &self.0.cache)
            .finish_non_exhaustive()
    }
}

fn wasmtime_config(config: &EngineConfig) -> Config {
    let mut c = Config::new();
    c.epoch_interruption(true);
    c.consume_fuel(config.fuel);
    c.max_wasm_stack(config::WASM_STACK_BYTES);
    c.async_stack_size(config::FIBER_STACK_BYTES);
    c.wasm_component_model(true);
    c.wasm_component_model_async(true);
    c.wasm_gc(true);
    c.wasm_function_references(true);
    c.wasm_exceptions(true);
    c.wasm_backtrace_details(wasmtime::WasmBacktraceDetails::Enable);
    // Nobody unwinds through our stacks with the system's unwinder.
    c.native_unwind_info(false);
    c.coredump_on_trap(config.core_dumps);
    c.memory_init_cow(true);
    if let Allocation::Pooling { instances } = config.allocation {
        let mut pool = PoolingAllocationConfig::new();
        pool.total_core_instances(instances)
            .total_component_instances(instances)
            .total_memories(instances)
            .total_tables(instances.saturating_mul(2))
            .total_stacks(instances)
            .total_gc_heaps(instances.min(256))
            .max_core_instances_per_component(config::MAX_CORE_INSTANCES_PER_COMPONENT)
            .max_memories_per_component(config::MAX_MEMORIES)
            .max_memories_per_module(config::MAX_MEMORIES)
            .max_tables_per_component(config::MAX_TABLES)
            .max_tables_per_module(config::MAX_TABLES)
            .max_memory_size(config::MAX_MEMORY_BYTES)
            .table_elements(config::MAX_TABLE_ELEMENTS)
            .max_unused_warm_slots(config::WARM_SLOTS)
            .linear_memory_keep_resident(config::KEEP_RESIDENT_BYTES)
            .table_keep_resident(config::KEEP_RESIDENT_BYTES)
            .async_stack_keep_resident(32 << 10);
        c.allocation_strategy(InstanceAllocationStrategy::Pooling(pool));
    }
    c
}

/// Reads the usual form of a digest.
fn digest_of(text: &str) -> Option<Sha> {
    let digits = text.strip_prefix("sha256:")?.as_bytes();
    let mut digest = Sha::default();
    if digits.len() != 2 * digest.len() {
        return None;
    }
    for (byte, pair) in digest.iter_mut().zip(digits.chunks_exact(2)) {
        *byte = u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()?;
    }
    Some(digest)
}

/// Collects what is hashed, so that all of it goes into a key.
#[derive(Default)]
struct Collect(Vec<u8>);

impl Hasher for Collect {
    fn write(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
    }

    fn finish(&self) -> u64 {
        0
    }
}

impl Engine {
    /// Makes an engine.
    ///
    /// # Errors
    /// The host lacks address space, or the cache cannot be used safely.
    pub fn new(config: &EngineConfig) -> Result<Self, WasmError> {
        let engine =
            wasmtime::Engine::new(&wasmtime_config(config)).map_err(|e| WasmError::engine(&e))?;
        let ticker =
            Ticker::start(engine.clone()).map_err(|e| WasmError::io("thread of the clock", e))?;
        let mut configuration = Collect::default();
        env!("CARGO_PKG_VERSION").hash(&mut configuration);
        engine
            .precompile_compatibility_hash()
            .hash(&mut configuration);
        Ok(Self(Arc::new(Inner {
            wasmtime: engine,
            ticker,
            core_linker: OnceLock::new(),
            component_linker: OnceLock::new(),
            cache: config.cache.as_ref().map(DiskCache::open).transpose()?,
            max_module_bytes: config.max_module_bytes,
            fuel: config.fuel,
            core_dumps: config.core_dumps,
            configuration: configuration.0,
            loaded: Mutex::new(LoadedPrograms {
                limit: config.loaded_programs,
                ..LoadedPrograms::default()
            }),
        })))
    }

    /// True if a file begins as WebAssembly does. Other files are for other kinds of sandbox.
    pub fn is_wasm(head: &[u8]) -> bool {
        Format::is_wasm(head)
    }

    /// Makes a program ready: from this process, from the cache, or by compiling it. Compiling
    /// takes long; call this from a thread that may wait.
    ///
    /// # Errors
    /// The program is damaged, too large or needs what the sandbox does not offer.
    pub fn load(&self, source: Source<'_>) -> Result<Program, WasmError> {
        match source {
            Source::File(path) => {
                let name = path
                    .file_name()
                    .map_or_else(|| path.to_string_lossy(), |n| n.to_string_lossy());
                // A FIFO must not hold us up.
                let file = File::options()
                    .read(true)
                    .custom_flags(libc::O_NONBLOCK)
                    .open(path)
                    .map_err(|e| WasmError::io(format!("program {}", path.display()), e))?;
                self.file(&one_line(&name), &file)
            }
            Source::Open { name, file } => self.file(&one_line(name), file),
            Source::Bytes { name, bytes } => {
                let digest: Sha = Sha256::digest(bytes).into();
                self.bytes(name, &digest, bytes)
            }
        }
    }

    /// A program that was made ready before, by the digest of its bytes (`sha256:` and hexadecimal
    /// digits). It is neither read nor compiled.
    pub fn find(&self, name: &str, digest: &str) -> Option<Program> {
        let digest = digest_of(digest)?;
        self.loaded(&digest).or_else(|| self.cached(name, &digest))
    }

    fn file(&self, name: &str, file: &File) -> Result<Program, WasmError> {
        let fail = |e| WasmError::io(format!("program {name}"), e);
        let meta = file.metadata().map_err(fail)?;
        if !meta.is_file() {
            return Err(WasmError::Invalid {
                name: name.to_owned(),
                reason: "it is not a regular file".into(),
            });
        }
        let known = self.0.cache.as_ref().and_then(|c| c.known_digest(&meta));
        if let Some(digest) = known
            && let Some(program) = self.loaded(&digest).or_else(|| self.cached(name, &digest))
        {
            return Ok(program);
        }
        self.check_size(name, meta.len())?;
        let bytes = read_limited(file, self.0.max_module_bytes).map_err(fail)?;
        self.check_size(name, bytes.len() as u64)?;
        let digest: Sha = Sha256::digest(&bytes).into();
        let program = self.bytes(name, &digest, &bytes)?;
        if let Some(cache) = &self.0.cache {
            // Changed while it was read: the digest is that of neither state.
            if file.metadata().is_ok_and(|now| {
                (now.ctime(), now.ctime_nsec()) == (meta.ctime(), meta.ctime_nsec())
            }) {
                cache.remember_digest(&meta, &digest);
            }
        }
        Ok(program)
    }

    fn check_size(&self, name: &str, size: u64) -> Result<(), WasmError> {
        if size > self.0.max_module_bytes {
            return Err(WasmError::TooLarge {
                name: name.to_owned(),
                size,
                limit: self.0.max_module_bytes,
            });
        }
        Ok(())
    }

    fn loaded(&self, digest: &Sha) -> Option<Program> {
        self.programs().get(digest).map(Program)
    }

    fn programs(&self) -> std::sync::MutexGuard<'_, LoadedPrograms> {
        self.0.loaded.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Loads from disk; what cannot be loaded is thrown away and made again.
    fn cached(&self, name: &str, digest: &Sha) -> Option<Program> {
        let cache = self.0.cache.as_ref()?;
        let key = program::code_key(digest, &self.0.configuration);
        let file = cache.get(&key)?;
        match self.load_file(name, &file, Origin::Disk) {
            Ok(loaded) => Some(self.keep(*digest, loaded)),
            Err(_) => {
                cache.remove(&key);
                None
            }
        }
    }

    fn keep(&self, digest: Sha, loaded: Loaded) -> Program {
        let loaded = Arc::new(loaded);
        self.programs().put(digest, &loaded);
        Program(loaded)
    }

    fn bytes(&self, name: &str, digest: &Sha, bytes: &[u8]) -> Result<Program, WasmError> {
        self.check_size(name, bytes.len() as u64)?;
        let format = Format::of(name, bytes)?;
        if let Some(program) = self.loaded(digest).or_else(|| self.cached(name, digest)) {
            return Ok(program);
        }
        let code = self.compile(name, format, bytes)?;
        let stored = self.0.cache.as_ref().and_then(|cache| {
            let key = program::code_key(digest, &self.0.configuration);
            // A full disk must not keep a program from running.
            cache.put(&key, &code).ok()
        });
        let loaded = match stored {
            Some(file) => self.load_file(name, &file, Origin::Compiled)?,
            None => self.load_bytes(name, format, &code)?,
        };
        Ok(self.keep(*digest, loaded))
    }

    /// Compiles on threads of its own, made for this and gone afterwards: they are in no pod's
    /// namespaces, and nothing stays behind that could be woken.
    fn compile(&self, name: &str, format: Format, bytes: &[u8]) -> Result<Vec<u8>, WasmError> {
        let threads = std::thread::available_parallelism()
            .map_or(1, usize::from)
            .min(config::COMPILE_THREADS);
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .thread_name(|n| format!("wasm-compile-{n}"))
            .build()
            .map_err(|e| WasmError::Engine {
                reason: format!("threads for compiling: {e}"),
            })?;
        let engine = &self.0.wasmtime;
        pool.install(|| match format {
            Format::Module => engine.precompile_module(bytes),
            Format::Component => engine.precompile_component(bytes),
        })
        .map_err(|e| WasmError::Invalid {
            name: name.to_owned(),
            reason: one_line(&format!("{e:#}")),
        })
    }

    fn load_file(&self, name: &str, file: &File, origin: Origin) -> Result<Loaded, WasmError> {
        let engine = &self.0.wasmtime;
        let fail = |e: wasmtime::Error| WasmError::engine(&e);
        // The very file that was verified, not one that has its name by now.
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        let kind = wasmtime::Engine::detect_precompiled_file(&path).map_err(fail)?;
        match kind {
            Some(wasmtime::Precompiled::Module) => {
                // SAFETY: the file was made by this engine's compiler, lies in a directory that
                // only we can write, and its MAC has been checked (see `cache`).
                let module = unsafe { Module::deserialize_file(engine, &path) }.map_err(fail)?;
                program::core(name, self.core_linker()?, &module, origin)
            }
            Some(wasmtime::Precompiled::Component) => {
                // SAFETY: as above.
                let component =
                    unsafe { Component::deserialize_file(engine, &path) }.map_err(fail)?;
                program::component(name, engine, self.component_linker()?, &component, origin)
            }
            None => Err(WasmError::Engine {
                reason: format!("{name}: the cached code is damaged"),
            }),
        }
    }

    fn load_bytes(&self, name: &str, format: Format, code: &[u8]) -> Result<Loaded, WasmError> {
        let engine = &self.0.wasmtime;
        let fail = |e: wasmtime::Error| WasmError::engine(&e);
        match format {
            Format::Module => {
                // SAFETY: the code comes from this engine's compiler, a few lines above.
                let module = unsafe { Module::deserialize(engine, code) }.map_err(fail)?;
                program::core(name, self.core_linker()?, &module, Origin::Compiled)
            }
            Format::Component => {
                // SAFETY: as above.
                let component = unsafe { Component::deserialize(engine, code) }.map_err(fail)?;
                program::component(
                    name,
                    engine,
                    self.component_linker()?,
                    &component,
                    Origin::Compiled,
                )
            }
        }
    }

    fn core_linker(&self) -> Result<&wasmtime::Linker<CoreState>, WasmError> {
        if let Some(linker) = self.0.core_linker.get() {
            return Ok(linker);
        }
        let linker = link::core(&self.0.wasmtime).map_err(|e| WasmError::engine(&e))?;
        Ok(self.0.core_linker.get_or_init(|| linker))
    }

    fn component_linker(&self) -> Result<&wasmtime::component::Linker<ComponentState>, WasmError> {
        if let Some(linker) = self.0.component_linker.get() {
            return Ok(linker);
        }
        let linker = link::component(&self.0.wasmtime).map_err(|e| WasmError::engine(&e))?;
        Ok(self.0.component_linker.get_or_init(|| linker))
    }

    /// Makes all programs look at their orders now instead of at the next tick.
    pub(crate) fn interrupt(&self) {
        self.0.wasmtime.increment_epoch();
    }
}
