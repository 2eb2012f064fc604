//! The engine: compiles, caches and links programs, and keeps the clock that interrupts them.

use std::collections::HashMap;
use std::fmt;
use std::fs::File;
use std::hash::{Hash, Hasher};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use sha2::{Digest, Sha256};
use wasmtime::{Config, InstanceAllocationStrategy, PoolingAllocationConfig};

use crate::cache::{DiskCache, Sha};
use crate::code::{Code, Outcome};
use crate::compile::{self, Compiled, Failure, Input};
use crate::compiles::Compiles;
use crate::config::{self, Allocation, EngineConfig};
use crate::error::{WasmError, one_line};
use crate::flavour::Flavour;
use crate::program::{self, Format, Loaded, Origin, Program, Source};
use crate::ticker::Ticker;

/// One engine for all pods of a process. Cheap to clone.
#[derive(Clone)]
pub struct Engine(pub(crate) Arc<Inner>);

pub(crate) struct Inner {
    pub(crate) config: EngineConfig,
    /// With the settings that were asked for.
    first: Flavour,
    /// Without inlining, for programs that are too large for it. Made when first needed: in a daemon
    /// it reserves address space.
    plain: OnceLock<Flavour>,
    pub(crate) ticker: Ticker,
    cache: Option<DiskCache>,
    compiles: Compiles,
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

pub(crate) fn wasmtime_config(config: &EngineConfig, inlining: bool) -> Config {
    let mut c = Config::new();
    if inlining {
        c.compiler_inlining(wasmtime::Inlining::Yes);
        // SAFETY: it is a number that inlining compares with, and makes no difference to what the
        // code does.
        unsafe {
            c.cranelift_flag_set(
                "wasmtime_inlining_sum_size_threshold",
                config::INLINING_MAX_SIZE,
            );
        }
    }
    c.epoch_interruption(true);
    c.consume_fuel(config.fuel);
    c.max_wasm_stack(config::WASM_STACK_BYTES);
    c.async_stack_size(config::FIBER_STACK_BYTES);
    c.wasm_component_model(true);
    c.wasm_component_model_async(true);
    c.wasm_gc(true);
    c.wasm_function_references(true);
    c.wasm_exceptions(true);
    // Toolchains emit atomic instructions for programs without threads, too. There are none: memory
    // is never shared.
    c.wasm_threads(true);
    c.shared_memory(false);
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

/// What is looked at to see what a file is.
const HEAD: usize = 64;

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
        let first = Flavour::new(config, config.compiler.inlining)?;
        let ticker = Ticker::start(first.wasmtime.clone())
            .map_err(|e| WasmError::io("thread of the clock", e))?;
        let mut configuration = Collect::default();
        env!("CARGO_PKG_VERSION").hash(&mut configuration);
        first
            .wasmtime
            .precompile_compatibility_hash()
            .hash(&mut configuration);
        Ok(Self(Arc::new(Inner {
            config: config.clone(),
            first,
            plain: OnceLock::new(),
            ticker,
            cache: config.cache.as_ref().map(DiskCache::open).transpose()?,
            compiles: Compiles::default(),
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
        self.get(source)
    }

    /// The same for a process that does not run it: its machine code, for [`Self::program`] of another
    /// one. Processes with the same cache compile one after the other.
    ///
    /// # Errors
    /// The program is damaged or too large.
    pub fn code(&self, source: Source<'_>) -> Result<Code, WasmError> {
        self.get(source)
    }

    /// Maps code of an engine with the same settings.
    ///
    /// # Errors
    /// The settings differ, or the program needs what the sandbox does not offer.
    pub fn program(&self, code: &Code) -> Result<Program, WasmError> {
        Ok(Program(Arc::new(self.map(code)?)))
    }

    pub(crate) fn map(&self, code: &Code) -> Result<Loaded, WasmError> {
        let flavour = self.flavour(code.inlined)?;
        flavour.load(&code.name, &code.file, code.origin)
    }

    fn get<O: Outcome>(&self, source: Source<'_>) -> Result<O, WasmError> {
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
                self.check_size(name, bytes.len() as u64)?;
                let digest: Sha = Sha256::digest(bytes).into();
                let format = Format::of(name, bytes)?;
                self.ready(
                    name,
                    &digest,
                    format,
                    Input::Bytes(bytes),
                    bytes.len() as u64,
                )
            }
        }
    }

    /// A program that was made ready before, by the digest of its bytes (`sha256:` and hexadecimal
    /// digits). It is neither read nor compiled.
    pub fn find(&self, name: &str, digest: &str) -> Option<Program> {
        self.known(name, &digest_of(digest)?)
    }

    /// The machine code of a program that was made ready before, see [`Self::find`].
    pub fn find_code(&self, name: &str, digest: &str) -> Option<Code> {
        self.known(name, &digest_of(digest)?)
    }

    fn known<O: Outcome>(&self, name: &str, digest: &Sha) -> Option<O> {
        O::known(self, digest).or_else(|| self.cached(name, digest))
    }

    fn file<O: Outcome>(&self, name: &str, file: &File) -> Result<O, WasmError> {
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
            && let Some(found) = self.known(name, &digest)
        {
            return Ok(found);
        }
        self.check_size(name, meta.len())?;
        let (copy, digest, head, size) = self.copy(name, file)?;
        let format = Format::of(name, &head)?;
        let made = self.ready(name, &digest, format, Input::Sealed(copy), size)?;
        if let Some(cache) = &self.0.cache {
            // Changed while it was read: the digest is that of neither state.
            if file.metadata().is_ok_and(|now| {
                (now.ctime(), now.ctime_nsec()) == (meta.ctime(), meta.ctime_nsec())
            }) {
                cache.remember_digest(&meta, &digest);
            }
        }
        Ok(made)
    }

    fn check_size(&self, name: &str, size: u64) -> Result<(), WasmError> {
        let limit = self.0.config.max_module_bytes;
        if size > limit {
            return Err(WasmError::TooLarge {
                name: name.to_owned(),
                size,
                limit,
            });
        }
        Ok(())
    }

    /// Copies a program to memory that nobody can change any more; with its digest, first
    /// bytes and size.
    fn copy(&self, name: &str, file: &File) -> Result<(File, Sha, Vec<u8>, u64), WasmError> {
        let fail = |e| WasmError::io(format!("program {name}"), e);
        let limit = self.0.config.max_module_bytes;
        let mut copy = compile::sealed("wasm").map_err(fail)?;
        let (mut digest, mut head, mut size) = (Sha256::new(), Vec::new(), 0u64);
        let mut file = file.take(limit.saturating_add(1));
        let mut buffer = vec![0; 256 << 10];
        loop {
            let count = match file.read(&mut buffer) {
                Ok(0) => break,
                Ok(count) => count,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => return Err(fail(e)),
            };
            let part = buffer.get(..count).unwrap_or_default();
            size = size.saturating_add(count as u64);
            self.check_size(name, size)?;
            if head.len() < HEAD {
                head.extend(part.iter().take(HEAD));
            }
            digest.update(part);
            copy.write_all(part).map_err(fail)?;
        }
        compile::seal(&copy).map_err(fail)?;
        Ok((copy, digest.finalize().into(), head, size))
    }

    pub(crate) fn loaded(&self, digest: &Sha) -> Option<Program> {
        self.programs().get(digest).map(Program)
    }

    fn programs(&self) -> std::sync::MutexGuard<'_, LoadedPrograms> {
        self.0.loaded.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The key of a program's code.
    fn key(&self, digest: &Sha, inlined: bool) -> Sha {
        let asked_for = inlined == self.0.config.compiler.inlining;
        program::code_key(digest, &self.0.configuration, asked_for)
    }

    /// wasmtime for code that was made with functions inlined, or without.
    fn flavour(&self, inlined: bool) -> Result<&Flavour, WasmError> {
        let Inner { config, first, .. } = &*self.0;
        if inlined == config.compiler.inlining {
            return Ok(first);
        }
        if let Some(plain) = self.0.plain.get() {
            return Ok(plain);
        }
        let made = Flavour::new(config, false)?;
        let plain = self.0.plain.get_or_init(|| made);
        self.0.ticker.add(&plain.wasmtime);
        Ok(plain)
    }

    /// Loads from disk; what cannot be loaded is thrown away and made again.
    fn cached<O: Outcome>(&self, name: &str, digest: &Sha) -> Option<O> {
        let cache = self.0.cache.as_ref()?;
        let asked_for = self.0.config.compiler.inlining;
        // What was to be inlined may have been too large for it.
        let flavours = if asked_for {
            &[true, false][..]
        } else {
            &[false]
        };
        for inlined in flavours {
            let key = self.key(digest, *inlined);
            let Some(file) = cache.get(&key) else {
                continue;
            };
            let code = Code {
                name: name.to_owned(),
                file,
                inlined: *inlined,
                origin: Origin::Disk,
            };
            match O::take(self, digest, code) {
                Ok(taken) => return Some(taken),
                Err(_) => cache.remove(&key),
            }
        }
        None
    }

    pub(crate) fn keep(&self, digest: Sha, loaded: Loaded) -> Program {
        let loaded = Arc::new(loaded);
        self.programs().put(digest, &loaded);
        Program(loaded)
    }

    /// From this process, from the cache, or compiled.
    fn ready<O: Outcome>(
        &self,
        name: &str,
        digest: &Sha,
        format: Format,
        input: Input<'_>,
        size: u64,
    ) -> Result<O, WasmError> {
        if let Some(known) = self.known(name, digest) {
            return Ok(known);
        }
        let _permit = self.0.compiles.enter(digest, size);
        let _turn = match (O::SHARED, &self.0.cache) {
            (true, Some(cache)) => Some(cache.turn()?),
            _ => None,
        };
        // Somebody else may have compiled it meanwhile.
        if let Some(known) = self.known(name, digest) {
            return Ok(known);
        }
        let engines = |inlined| {
            let flavour = self.flavour(inlined).map_err(|e| e.to_string())?;
            Ok(flavour.wasmtime.clone())
        };
        let compiled = compile::compile(&self.0.config, &engines, format, input);
        let name_it = || name.to_owned();
        let Compiled { code, inlined } = compiled.map_err(|failure| match failure {
            Failure::Invalid(reason) => WasmError::Invalid {
                name: name_it(),
                reason,
            },
            Failure::Broken(reason) => WasmError::Compiler {
                name: name_it(),
                reason,
            },
            Failure::Interrupted(signal) => WasmError::Interrupted {
                name: name_it(),
                signal,
            },
        })?;
        let stored = self.0.cache.as_ref().and_then(|cache| {
            // A full disk must not keep a program from running.
            cache.put(&self.key(digest, inlined), &code).ok()
        });
        let code = Code {
            name: name.to_owned(),
            file: stored.unwrap_or(code),
            inlined,
            origin: Origin::Compiled,
        };
        O::take(self, digest, code)
    }

    /// Makes all programs look at their orders now instead of at the next tick.
    pub(crate) fn interrupt(&self) {
        self.0.ticker.tick();
    }
}
