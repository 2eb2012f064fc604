//! Settings of an engine. Everything a program can make grow has a limit here, with its reason.

use std::path::PathBuf;

/// One engine serves all pods of a daemon; a second configuration is a second engine.
#[derive(Debug, Clone)]
pub struct EngineConfig {
    /// How instances get their memory.
    pub allocation: Allocation,
    /// Where compiled programs are kept; `None` compiles at every load.
    pub cache: Option<CacheConfig>,
    /// Largest program that is compiled, in bytes. Compiling takes time and memory in proportion.
    pub max_module_bytes: u64,
    /// Count instructions, so that [`crate::ContainerConfig::fuel`] works. Costs speed.
    pub fuel: bool,
    /// Take down the state of a program that traps, so that [`crate::ContainerConfig::core_dump`]
    /// works.
    pub core_dumps: bool,
    /// Compiled programs kept mapped in this process, by number.
    pub loaded_programs: usize,
    /// How programs are compiled.
    pub compiler: CompilerConfig,
}

/// How programs are compiled.
#[derive(Debug, Clone)]
pub struct CompilerConfig {
    /// The program that is started for it, whose `main` calls [`crate::compiler_main`]: as a rule
    /// `/proc/self/exe`. `None` compiles in this process, and limits nothing.
    pub program: Option<PathBuf>,
    /// Most memory that the compiler's process may take for one program, in bytes; it gets less where
    /// the host has less than twice that available. Inlining takes some 500 times the size of the
    /// code.
    pub memory_bytes: u64,
    /// Small functions are inlined, which makes programs faster (CPython by a tenth) and leaves their
    /// frames out of backtraces.
    pub inlining: bool,
}

impl Default for CompilerConfig {
    fn default() -> Self {
        Self {
            program: None,
            memory_bytes: 4 << 30,
            inlining: true,
        }
    }
}

/// How instances get their memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Allocation {
    /// Reserved at each start: right for a process that runs one program.
    OnDemand,
    /// Slots made once and reset, not unmapped, after use: right for a daemon. Address space only
    /// is taken beforehand (about 4 GiB a slot).
    Pooling {
        /// Most instances at one time.
        instances: u32,
    },
}

/// The cache of compiled programs on disk.
#[derive(Debug, Clone)]
pub struct CacheConfig {
    /// Directory, made with mode 0700 if missing. It must be ours alone.
    pub directory: PathBuf,
    /// Least recently used programs go when the cache grows beyond this, in bytes.
    pub max_bytes: u64,
}

impl Default for EngineConfig {
    fn default() -> Self {
        Self {
            allocation: Allocation::OnDemand,
            cache: None,
            max_module_bytes: 100 << 20,
            fuel: false,
            core_dumps: false,
            loaded_programs: 64,
            compiler: CompilerConfig::default(),
        }
    }
}

/// Stack for WebAssembly frames, in bytes: what wasmtime gives by default, doubled, as deep
/// recursion (Python) is common.
pub(crate) const WASM_STACK_BYTES: usize = 1 << 20;
/// The fiber's stack: WebAssembly's, and room for host functions on top of it. Untouched pages
/// cost nothing.
pub(crate) const FIBER_STACK_BYTES: usize = 2 << 20;
/// Largest linear memory: the whole 32-bit address space; pods are held to less by their budget.
pub(crate) const MAX_MEMORY_BYTES: usize = 1 << 32;
/// Most elements of one table: an interpreter's table holds some ten thousand.
pub(crate) const MAX_TABLE_ELEMENTS: usize = 1 << 20;
/// Charged to a pod's memory for each table element.
pub(crate) const TABLE_ELEMENT_BYTES: u64 = 16;
/// Components made from several languages' runtimes hold some 30 core modules.
pub(crate) const MAX_CORE_INSTANCES_PER_COMPONENT: u32 = 128;
/// Most memories of one program.
pub(crate) const MAX_MEMORIES: u32 = 16;
/// Most tables of one program.
pub(crate) const MAX_TABLES: u32 = 32;
/// Linear memory of a slot that is reset by writing instead of by a system call that would flush
/// the address space shared with virtual machines.
pub(crate) const KEEP_RESIDENT_BYTES: usize = 256 << 10;
/// Unused slots that stay warm.
pub(crate) const WARM_SLOTS: u32 = 64;
/// A running program is interrupted this often, to let its timers and sockets be looked at and to
/// hold it to its CPU share.
pub(crate) const TICK_MS: u64 = 10;
/// Open resources (files, sockets, streams) of one instance.
pub(crate) const MAX_RESOURCES: usize = 10_000;
/// Random bytes in one call.
pub(crate) const MAX_RANDOM_BYTES: u64 = 16 << 20;
/// Cores used for compiling one program.
pub(crate) const COMPILE_THREADS: usize = 4;
/// Programs compiled at a time; more wait.
pub(crate) const COMPILES: usize = 3;
/// Programs from this size on are compiled one after the other: they may take all the memory that a
/// compiler may have.
pub(crate) const LARGE_PROGRAM_BYTES: u64 = 1 << 20;
/// Memory that inlining takes for each byte of a program's code: it keeps all functions, and what each
/// was compiled with, until the last one is done. Programs for which that would be more than the
/// compiler may have are compiled without. Measured on 1.8 to 6.6 MB of
/// code: 420 to 530.
pub(crate) const INLINING_BYTES_PER_CODE_BYTE: u64 = 600;
/// What a compiler gets even if the host has little memory: enough for most programs, if functions
/// are not inlined.
pub(crate) const MIN_COMPILE_BYTES: u64 = 256 << 20;
/// Calls are inlined up to this size of the function that they end in, in instructions of the
/// compiler's. More gains little, and takes more memory than the compiler may have for the largest
/// programs that were tried.
pub(crate) const INLINING_MAX_SIZE: &str = "450";
