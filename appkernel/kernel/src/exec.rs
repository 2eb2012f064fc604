//! Making the memory of a new program: segments, dynamic loader, stack.

use alloc::sync::Arc;
use alloc::vec;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicBool, Ordering};

use appkernel_core::elf::{HEADER, Header, Segments};
use appkernel_core::errno::Errno;
use appkernel_core::fuse::Attributes;
use appkernel_core::vma::{Area, Backing, EXECUTE, READ, WRITE};
use appkernel_hal::trap::Frame;
use appkernel_hal::{PAGE, USER_END, cpu};

use crate::container::Container;
use crate::fs;
use crate::fs::node::Node;
use crate::mm::{MMAP_TOP, Mapping, Mm, STACK_BYTES, STACK_TOP};
use crate::task::Credentials;
use crate::vdso;

/// Where relocatable programs go (as on Linux without randomisation).
const PROGRAM_BASE: u64 = 0x5555_5555_4000;
/// Arguments and environment together, in bytes (Linux: a quarter of the stack's limit, which is four
/// times as much; here they are in one piece on the way).
pub const ARGUMENTS_MAX: usize = 512 << 10;
/// Bytes of one of them with its end, as Linux has it.
pub const ARGUMENT_MAX: usize = 128 << 10;
/// Scripts whose interpreter is a script, at most (as Linux).
const SCRIPT_DEPTH: usize = 5;
const SCRIPT_LINE: usize = 256;

/// Entries of the auxiliary vector.
mod at {
    pub const PHDR: u64 = 3;
    pub const PHENT: u64 = 4;
    pub const PHNUM: u64 = 5;
    pub const PAGESZ: u64 = 6;
    pub const BASE: u64 = 7;
    pub const ENTRY: u64 = 9;
    pub const UID: u64 = 11;
    pub const EUID: u64 = 12;
    pub const GID: u64 = 13;
    pub const EGID: u64 = 14;
    pub const PLATFORM: u64 = 15;
    pub const CLKTCK: u64 = 17;
    pub const SECURE: u64 = 23;
    pub const RANDOM: u64 = 25;
    pub const EXECFN: u64 = 31;
    pub const SYSINFO_EHDR: u64 = 33;
}

/// A program to run.
#[derive(Clone, Debug)]
pub struct Request {
    pub path: Vec<u8>,
    pub arguments: Vec<Vec<u8>>,
    pub environment: Vec<Vec<u8>>,
}

/// A program ready to run.
pub struct Image {
    pub mm: Mm,
    pub path: Vec<u8>,
    /// The path as it was asked for: the task is called after it.
    pub called: Vec<u8>,
    /// Who it runs as, where that is not who asked for it.
    becomes: Becomes,
    entry: u64,
    stack: u64,
}

/// Users and groups that a set-user-id or set-group-id program runs as.
#[derive(Clone, Copy, Debug, Default)]
struct Becomes {
    uid: Option<u32>,
    gid: Option<u32>,
}

impl Becomes {
    fn of(attributes: &Attributes, allowed: bool) -> Self {
        const SET_USER: u32 = 0o4000;
        const SET_GROUP: u32 = 0o2010;
        let has = |bits| allowed && attributes.mode & bits == bits;
        Self {
            uid: has(SET_USER).then_some(attributes.uid),
            gid: has(SET_GROUP).then_some(attributes.gid),
        }
    }

    fn apply(self, credentials: &mut Credentials) {
        credentials.euid = self.uid.unwrap_or(credentials.euid);
        credentials.egid = self.gid.unwrap_or(credentials.egid);
        (credentials.suid, credentials.fsuid) = (credentials.euid, credentials.euid);
        (credentials.sgid, credentials.fsgid) = (credentials.egid, credentials.egid);
        let (uid, euid) = (credentials.uid, credentials.euid);
        credentials.capabilities.program(uid, euid);
    }
}

impl core::fmt::Debug for Image {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Image").finish_non_exhaustive()
    }
}

impl Image {
    /// Makes whoever asked for it who it runs as.
    pub fn set_credentials(&self, credentials: &mut Credentials) {
        self.becomes.apply(credentials);
    }

    /// Registers at its first instruction.
    pub fn frame(&self) -> Frame {
        Frame {
            // The file says where; an address that is none would be a fault of the kernel's when it
            // goes there, so it is the first that no program has: a fault of the program's.
            rip: self.entry.min(USER_END),
            rsp: self.stack,
            cs: cpu::USER_CODE.into(),
            ss: cpu::USER_DATA.into(),
            rflags: 0x202,
            ..Frame::default()
        }
    }
}

/// Whether the machine wants random addresses (`norandmaps` on its command line: no).
static RANDOM: AtomicBool = AtomicBool::new(true);

/// Says whether the machine wants random addresses.
pub fn randomize(on: bool) {
    RANDOM.store(on, Ordering::Relaxed);
}

/// Whether a program of this personality gets random addresses.
pub fn is_random(persona: u32) -> bool {
    const NO_RANDOMIZE: u32 = 0x4_0000;
    RANDOM.load(Ordering::Relaxed) && persona & NO_RANDOMIZE == 0
}

/// Where a program runs, and for whom.
#[derive(Clone, Copy)]
pub struct Context<'a> {
    pub container: &'a Container,
    pub cwd: &'a [u8],
    pub credentials: &'a Credentials,
    /// Where things are in its memory is left to chance.
    pub random: bool,
    /// It may run as who owns the program, if the program wants that.
    pub may_become: bool,
}

/// Why there is no program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// The caller goes on, with this error.
    Refused(Errno),
    /// The file is a program whose parts cannot be put where it wants them. Linux finds that when the
    /// old program is gone already, and ends the process by SIGSEGV.
    Fatal,
}

impl From<Errno> for Failure {
    fn from(error: Errno) -> Self {
        Self::Refused(error)
    }
}

/// Reads the program and makes its memory.
///
/// # Errors
/// As execve(2), without a process that could be ended.
pub fn load(request: &Request, context: Context<'_>) -> Result<Image, Errno> {
    replace(request, context).map_err(|failure| match failure {
        Failure::Refused(error) => error,
        Failure::Fatal => Errno::ENOEXEC,
    })
}

/// The same for a process that has a program already.
///
/// # Errors
/// As execve(2).
pub fn replace(request: &Request, context: Context<'_>) -> Result<Image, Failure> {
    let called = request.path.clone();
    let mut request = request.clone();
    // Programs count on a name: since 5.18 they always get one.
    if request.arguments.is_empty() {
        request.arguments.push(Vec::new());
    }
    for _ in 0..SCRIPT_DEPTH {
        let found = fs::resolve(context.container, context.cwd, &request.path, true)?;
        let mut node = found.node;
        // By the number of an open file that may have no name any more.
        if let Node::Proc(entry) = &node
            && let Some(file) = entry.open_file()
        {
            node = file.node().cloned().ok_or(Errno::EACCES)?;
        }
        if !node.is_regular() {
            return Err(Errno::EACCES.into());
        }
        let attributes = node.attributes()?;
        if attributes.mode & 0o111 == 0 || !context.credentials.may(&attributes, 1) {
            return Err(Errno::EACCES.into());
        }
        let mut head = vec![0; SCRIPT_LINE];
        let len = node.read(0, &mut head)?;
        head.truncate(len);
        if head.starts_with(b"#!") {
            request = script(&head, &request)?;
            continue;
        }
        let becomes = Becomes::of(&attributes, context.may_become);
        let image = program(&node, found.path, &request, context, becomes)?;
        return Ok(Image { called, ..image });
    }
    Err(Errno::ELOOP.into())
}

/// The request for a script's interpreter.
fn script(head: &[u8], request: &Request) -> Result<Request, Errno> {
    let line = head.get(2..).unwrap_or_default();
    let line = line
        .split(|b| *b == b'\n')
        .next()
        .unwrap_or_default()
        .trim_ascii();
    let end = line
        .iter()
        .position(|b| matches!(b, b' ' | b'\t'))
        .unwrap_or(line.len());
    let (interpreter, rest) = line.split_at(end);
    if interpreter.is_empty() {
        return Err(Errno::ENOEXEC);
    }
    let rest = rest.trim_ascii();
    let mut arguments = vec![interpreter.to_vec()];
    if !rest.is_empty() {
        arguments.push(rest.to_vec());
    }
    arguments.push(request.path.clone());
    arguments.extend(request.arguments.iter().skip(1).cloned());
    Ok(Request {
        path: interpreter.to_vec(),
        arguments,
        environment: request.environment.clone(),
    })
}

struct Loaded {
    header: Header,
    segments: Segments,
    /// Added to all its addresses.
    base: u64,
}

fn read_elf(node: &Node) -> Result<(Header, Segments), Failure> {
    let mut bytes = [0; HEADER];
    if node.read(0, &mut bytes)? < HEADER {
        return Err(Errno::ENOEXEC.into());
    }
    let header = Header::parse(&bytes)?;
    let mut table = vec![0; header.table_bytes()];
    if node.read(header.table_offset, &mut table)? < table.len() {
        return Err(Errno::ENOEXEC.into());
    }
    let segments = Segments::parse(&table).map_err(|_| Failure::Fatal)?;
    Ok((header, segments))
}

fn map(mm: &mut Mm, node: &Node, path: &[u8], wanted: u64) -> Result<Loaded, Failure> {
    let (header, segments) = read_elf(node)?;
    let base = map_segments(mm, node, path, wanted, &header, &segments).map_err(|e| match e {
        Errno::ENOMEM => Failure::Refused(e),
        _ => Failure::Fatal,
    })?;
    Ok(Loaded {
        header,
        segments,
        base,
    })
}

/// Maps the segments; gives what is added to their addresses.
fn map_segments(
    mm: &mut Mm,
    node: &Node,
    path: &[u8],
    wanted: u64,
    header: &Header,
    segments: &Segments,
) -> Result<u64, Errno> {
    let file = Mapping::new(node.clone(), path.to_vec(), false);
    let (start, end) = segments.extent();
    let base = match (header.relocatable, wanted) {
        (false, _) => 0,
        (true, 0) => mm
            .areas
            .find_free(end - start, PAGE << 4, mm.mmap_top)
            .ok_or(Errno::ENOMEM)?
            .saturating_sub(start),
        (true, wanted) => wanted,
    };
    for segment in &segments.load {
        let address = base.checked_add(segment.address).ok_or(Errno::ENOEXEC)?;
        let first = address & !(PAGE - 1);
        let file_end = address
            .checked_add(segment.file_bytes)
            .ok_or(Errno::ENOEXEC)?;
        let memory_end = address
            .checked_add(segment.memory_bytes)
            .ok_or(Errno::ENOEXEC)?;
        if memory_end > mm.stack_top - STACK_BYTES || first < crate::mm::LOWEST {
            return Err(Errno::ENOEXEC);
        }
        let mut protection = 0;
        for (flag, bit) in [(4, READ), (2, WRITE), (1, EXECUTE)] {
            if segment.flags & flag != 0 {
                protection |= bit;
            }
        }
        let file_pages = if segment.file_bytes == 0 {
            first
        } else {
            file_end.next_multiple_of(PAGE)
        };
        mm.map(Area {
            start: first,
            end: file_pages,
            protection,
            shared: false,
            backing: Backing::File(Arc::clone(&file), segment.offset & !(PAGE - 1)),
        })?;
        if memory_end > file_pages {
            mm.map(Area {
                start: file_pages,
                end: memory_end.next_multiple_of(PAGE),
                protection,
                shared: false,
                backing: Backing::Zero,
            })?;
        }
        // The rest of the last page of the file is zeros, to the page's end: the dynamic loader's
        // first allocations are there and it takes them to be.
        let tail = file_pages.saturating_sub(file_end);
        if tail > 0
            && segment.memory_bytes > segment.file_bytes
            && protection & WRITE != 0
            && segment.file_bytes > 0
        {
            mm.write(file_end, &vec![0; tail as usize])?;
        }
        mm.brk_start = mm.brk_start.max(memory_end.next_multiple_of(PAGE));
    }
    Ok(base)
}

/// Random numbers for a new program: how far things in its memory are moved, as far as on Linux, and 16
/// bytes for itself.
struct Chance {
    bytes: [u8; 16],
    moves: [u64; 4],
    used: usize,
}

impl Chance {
    fn new(wanted: bool) -> Self {
        let mut all = [0; 48];
        cpu::random(&mut all);
        let (bytes, rest) = all.split_at(16);
        let mut chance = Self {
            bytes: bytes.try_into().unwrap_or_default(),
            moves: [0; 4],
            used: 0,
        };
        if wanted {
            for (to, from) in chance.moves.iter_mut().zip(rest.chunks(8)) {
                *to = u64::from_le_bytes(from.try_into().unwrap_or_default());
            }
        }
        chance
    }

    /// Up to `1 << bits` pages, in bytes.
    fn pages(&mut self, bits: u32) -> u64 {
        let number = self.moves.get(self.used).copied().unwrap_or(0);
        self.used += 1;
        (number & ((1 << bits) - 1)) * PAGE
    }
}

fn program(
    node: &Node,
    path: Vec<u8>,
    request: &Request,
    context: Context<'_>,
    becomes: Becomes,
) -> Result<Image, Failure> {
    let mut mm = Mm::new()?;
    let mut chance = Chance::new(context.random);
    mm.mmap_top = MMAP_TOP - chance.pages(28);
    mm.stack_top = STACK_TOP - chance.pages(19);
    let loaded = map(&mut mm, node, &path, PROGRAM_BASE + chance.pages(28))?;
    mm.brk_start += chance.pages(13);
    mm.brk = mm.brk_start;
    let mut entry = loaded.base.saturating_add(loaded.header.entry);
    let mut loader_base = 0;
    if let Some((offset, len)) = loaded.segments.interpreter {
        let mut name = vec![
            0;
            usize::try_from(len)
                .ok()
                .filter(|l| (2..4096).contains(l))
                .ok_or(Errno::ENOEXEC)?
        ];
        if node.read(offset, &mut name)? < name.len() || name.pop() != Some(0) {
            return Err(Errno::ENOEXEC.into());
        }
        let found = fs::resolve(context.container, context.cwd, &name, true)?;
        let brk = mm.brk_start;
        let loader = map(&mut mm, &found.node, &found.path, 0)?;
        mm.brk_start = brk;
        if loader.segments.interpreter.is_some() {
            return Err(Errno::ENOEXEC.into());
        }
        entry = loader.base.saturating_add(loader.header.entry);
        loader_base = loader.base;
    }
    mm.map(Area {
        start: mm.stack_top - STACK_BYTES,
        end: mm.stack_top,
        protection: READ | WRITE,
        shared: false,
        backing: Backing::Zero,
    })?;
    let vdso = vdso::map(&mut mm)?;
    let bases = (loader_base, vdso);
    let random = chance.bytes;
    let mut credentials = context.credentials.clone();
    becomes.apply(&mut credentials);
    let stack = stack(&mut mm, &loaded, bases, request, &credentials, random)?;
    Ok(Image {
        mm,
        path,
        called: Vec::new(),
        becomes,
        entry,
        stack,
    })
}

/// Writes arguments, environment and auxiliary vector as the System V ABI has them.
fn stack(
    mm: &mut Mm,
    loaded: &Loaded,
    (loader_base, vdso): (u64, Option<u64>),
    request: &Request,
    credentials: &Credentials,
    random: [u8; 16],
) -> Result<u64, Errno> {
    let all = request.arguments.iter().chain(&request.environment);
    let total: usize = all.map(|s| s.len() + 1).sum();
    if total > ARGUMENTS_MAX {
        return Err(Errno::E2BIG);
    }
    // In one piece, which there may be none of.
    let mut strings: Vec<u8> = Vec::new();
    let names = request.path.len() + 64;
    strings
        .try_reserve_exact(total + names)
        .map_err(|_| Errno::ENOMEM)?;
    let mut put = |bytes: &[u8]| {
        let at = strings.len() as u64;
        strings.extend(bytes);
        strings.push(0);
        at
    };
    let random_at = put(&random);
    let platform = put(b"x86_64");
    let name = put(&request.path);
    let arguments: Vec<u64> = request.arguments.iter().map(|a| put(a)).collect();
    let environment: Vec<u64> = request.environment.iter().map(|e| put(e)).collect();
    let end = put(b"");
    let base = (mm.stack_top - 16 - strings.len() as u64) & !15;
    mm.write(base, &strings)?;
    let first = arguments.first().copied().unwrap_or(end);
    let middle = environment.first().copied().unwrap_or(end);
    mm.arguments = (base + first, middle.saturating_sub(first));
    mm.environment = (base + middle, end.saturating_sub(middle));
    let mut words = vec![arguments.len() as u64];
    words.extend(arguments.iter().map(|a| base + a));
    words.push(0);
    words.extend(environment.iter().map(|e| base + e));
    words.push(0);
    let secure = credentials.uid != credentials.euid || credentials.gid != credentials.egid;
    let vector = words.len();
    let table = loaded.base + loaded.segments.table_address(&loaded.header);
    for (key, value) in [
        (at::PHDR, table),
        (at::PHENT, 56),
        (at::PHNUM, loaded.header.count.into()),
        (at::PAGESZ, PAGE),
        (at::BASE, loader_base),
        (at::ENTRY, loaded.base.wrapping_add(loaded.header.entry)),
        (at::UID, credentials.uid.into()),
        (at::EUID, credentials.euid.into()),
        (at::GID, credentials.gid.into()),
        (at::EGID, credentials.egid.into()),
        (at::CLKTCK, 100),
        (at::SECURE, secure.into()),
        (at::PLATFORM, base + platform),
        (at::RANDOM, base + random_at),
        (at::EXECFN, base + name),
    ] {
        words.extend([key, value]);
    }
    if let Some(vdso) = vdso {
        words.extend([at::SYSINFO_EHDR, vdso]);
    }
    words.extend([0, 0]);
    let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
    let at = (base - bytes.len() as u64) & !15;
    mm.write(at, &bytes)?;
    let (start, len) = (vector as u64 * 8, bytes.len() as u64);
    mm.auxiliary = (at + start, len - start);
    Ok(at)
}
