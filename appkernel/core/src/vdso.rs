//! The image that programs find through `AT_SYSINFO_EHDR` (vdso(7)): an ELF file of one page, with
//! the few functions that answer without a system call.

use alloc::vec::Vec;

/// Bytes of the image.
pub const PAGE: usize = 4096;
/// Where the functions' code is in it. The code counts on this: it looks for its data from there.
pub const CODE_AT: usize = 0x800;

/// The only version of the symbols, and the library's name.
const VERSION: &str = "LINUX_2.6";
const LIBRARY: &str = "linux-vdso.so.1";
const HEADER: usize = 64;
const PROGRAM_HEADER: usize = 56;
const PROGRAM_HEADERS: usize = 2;
const SYMBOL: usize = 24;
const BUCKETS: usize = 4;

/// A function: its name without the prefix `__vdso_`, with which it is there too, and where its code
/// begins and ends in the code.
#[derive(Clone, Copy, Debug)]
pub struct Function {
    /// Its name.
    pub name: &'static str,
    /// First byte.
    pub start: usize,
    /// Byte after the last.
    pub end: usize,
}

/// The hash of a name in `DT_HASH` and in versions.
const fn hash(name: &[u8]) -> u32 {
    let mut h = 0u32;
    let mut i = 0;
    while i < name.len() {
        h = (h << 4).wrapping_add(name[i] as u32);
        let high = h & 0xf000_0000;
        h = (h ^ high >> 24) & !high;
        i += 1;
    }
    h
}

/// A part of the image that grows at its end.
struct Part {
    bytes: Vec<u8>,
}

impl Part {
    fn at(bytes: Vec<u8>) -> Self {
        Self { bytes }
    }
    fn here(&self) -> u64 {
        self.bytes.len() as u64
    }
    fn align(&mut self, to: usize) {
        let len = self.bytes.len().next_multiple_of(to);
        self.bytes.resize(len, 0);
    }
    fn u16(&mut self, value: u16) {
        self.bytes.extend(value.to_le_bytes());
    }
    fn u32(&mut self, value: u32) {
        self.bytes.extend(value.to_le_bytes());
    }
    fn u64(&mut self, value: u64) {
        self.bytes.extend(value.to_le_bytes());
    }
}

/// Makes the image; `None` if the functions do not fit.
pub fn image(code: &[u8], functions: &[Function]) -> Option<Vec<u8>> {
    // Names: of the library, of the version, of each function twice.
    let mut strings: Vec<u8> = alloc::vec![0];
    let mut name = |prefix: &str, name: &str| {
        let at = strings.len() as u32;
        strings.extend(prefix.bytes());
        strings.extend(name.bytes());
        strings.push(0);
        at
    };
    let (library, version) = (name("", LIBRARY), name("", VERSION));
    let mut symbols: Vec<(u32, u32, Function)> = Vec::new();
    for function in functions {
        if function.start > function.end || function.end > code.len() {
            return None;
        }
        for prefix in ["__vdso_", ""] {
            let whole = [prefix, function.name].concat();
            let hash = hash(whole.as_bytes());
            symbols.push((name(prefix, function.name), hash, *function));
        }
    }
    let count = symbols.len() + 1;

    let mut part = Part::at(alloc::vec![0; HEADER + PROGRAM_HEADERS * PROGRAM_HEADER]);
    part.align(8);
    let symbols_at = part.here();
    part.bytes.resize(part.bytes.len() + SYMBOL, 0);
    for (name, _, function) in &symbols {
        // A function; the ones with the plain names are weak. Any section will do.
        const GLOBAL: u8 = 0x12;
        const WEAK: u8 = 0x22;
        let plain = strings.get(*name as usize) != Some(&b'_');
        part.u32(*name);
        part.bytes.extend([if plain { WEAK } else { GLOBAL }, 0]);
        part.u16(1);
        part.u64((CODE_AT + function.start) as u64);
        part.u64((function.end - function.start) as u64);
    }
    let hashes_at = part.here();
    part.u32(BUCKETS as u32);
    part.u32(count as u32);
    let mut buckets = [0u32; BUCKETS];
    let mut chains = alloc::vec![0u32; count];
    for (i, (_, hash, _)) in symbols.iter().enumerate() {
        let index = i + 1;
        let bucket = buckets.get_mut(*hash as usize % BUCKETS)?;
        *chains.get_mut(index)? = *bucket;
        *bucket = index as u32;
    }
    for word in buckets.iter().chain(&chains) {
        part.u32(*word);
    }
    let versions_at = part.here();
    part.u16(0);
    for _ in &symbols {
        part.u16(2);
    }
    part.align(8);
    // Two versions: the library itself, and the one of the symbols.
    let definitions_at = part.here();
    for (flags, index, name, text, next) in
        [(1, 1, library, LIBRARY, 28), (0, 2, version, VERSION, 0u32)]
    {
        for value in [1, flags, index, 1] {
            part.u16(value);
        }
        part.u32(hash(text.as_bytes()));
        part.u32(20);
        part.u32(next);
        part.u32(name);
        part.u32(0);
    }
    let strings_at = part.here();
    part.bytes.extend(&strings);
    part.align(8);
    let dynamic_at = part.here();
    for (tag, value) in [
        (14, library.into()),          // DT_SONAME
        (4, hashes_at),                // DT_HASH
        (5, strings_at),               // DT_STRTAB
        (10, strings.len() as u64),    // DT_STRSZ
        (6, symbols_at),               // DT_SYMTAB
        (11, SYMBOL as u64),           // DT_SYMENT
        (0x6fff_fff0, versions_at),    // DT_VERSYM
        (0x6fff_fffc, definitions_at), // DT_VERDEF
        (0x6fff_fffd, 2),              // DT_VERDEFNUM
        (0, 0),
    ] {
        part.u64(tag);
        part.u64(value);
    }
    let dynamic_end = part.here();
    if part.bytes.len() > CODE_AT || CODE_AT + code.len() > PAGE {
        return None;
    }
    part.bytes.resize(CODE_AT, 0);
    part.bytes.extend(code);
    part.bytes.resize(PAGE, 0);

    let mut head = Part::at(alloc::vec![0x7f, b'E', b'L', b'F', 2, 1, 1, 0]);
    head.align(16);
    head.u16(3); // a shared object
    head.u16(62); // x86-64
    head.u32(1);
    head.u64(CODE_AT as u64);
    head.u64(HEADER as u64);
    head.u64(0); // no sections
    head.u32(0);
    head.u16(HEADER as u16);
    head.u16(PROGRAM_HEADER as u16);
    head.u16(PROGRAM_HEADERS as u16);
    for _ in 0..3 {
        head.u16(0);
    }
    for (kind, flags, at, len, align) in [
        (1u32, 5u32, 0, PAGE as u64, PAGE as u64),
        (2, 4, dynamic_at, dynamic_end - dynamic_at, 8),
    ] {
        head.u32(kind);
        head.u32(flags);
        for value in [at, at, at, len, len, align] {
            head.u64(value);
        }
    }
    part.bytes
        .get_mut(..head.bytes.len())?
        .copy_from_slice(&head.bytes);
    Some(part.bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    const FUNCTIONS: [Function; 2] = [
        Function {
            name: "time",
            start: 0,
            end: 16,
        },
        Function {
            name: "clock_gettime",
            start: 0x100,
            end: 0x180,
        },
    ];

    fn u16_at(image: &[u8], at: usize) -> usize {
        u16::from_le_bytes(image[at..at + 2].try_into().unwrap()).into()
    }
    fn u32_at(image: &[u8], at: usize) -> usize {
        u32::from_le_bytes(image[at..at + 4].try_into().unwrap()) as usize
    }
    fn u64_at(image: &[u8], at: usize) -> usize {
        u64::from_le_bytes(image[at..at + 8].try_into().unwrap()) as usize
    }
    fn text(image: &[u8], at: usize) -> &str {
        let end = at + image[at..].iter().position(|b| *b == 0).unwrap();
        core::str::from_utf8(&image[at..end]).unwrap()
    }

    /// Looks a symbol up as dynamic loaders do: by hash, name and version.
    fn look_up(image: &[u8], name: &str) -> Option<(usize, usize)> {
        let dynamic = (0..u16_at(image, 56))
            .map(|i| u64_at(image, 32) + i * 56)
            .find(|at| u32_at(image, *at) == 2)?;
        let (start, len) = (u64_at(image, dynamic + 16), u64_at(image, dynamic + 32));
        let tag = |wanted: usize| {
            (start..start + len)
                .step_by(16)
                .find(|at| u64_at(image, *at) == wanted)
                .map(|at| u64_at(image, at + 8))
        };
        let (hashes, symbols, strings) = (tag(4)?, tag(6)?, tag(5)?);
        let (versions, definitions) = (tag(0x6fff_fff0)?, tag(0x6fff_fffc)?);
        assert_eq!(text(image, strings + tag(14)?), LIBRARY);
        let version = (0..tag(0x6fff_fffd)?)
            .scan(definitions, |at, _| {
                let here = *at;
                *at += u32_at(image, here + 16);
                Some(here)
            })
            .find(|at| {
                let aux = at + u32_at(image, at + 12);
                u16_at(image, at + 2) & 1 == 0
                    && text(image, strings + u32_at(image, aux)) == VERSION
            })
            .map(|at| {
                assert_eq!(u32_at(image, at + 8), 0x3ae_75f6, "as Go has it");
                u16_at(image, at + 4)
            })?;
        let buckets = u32_at(image, hashes);
        let mut index = u32_at(
            image,
            hashes + 8 + hash(name.as_bytes()) as usize % buckets * 4,
        );
        while index != 0 {
            let symbol = symbols + index * SYMBOL;
            if text(image, strings + u32_at(image, symbol)) == name
                && u16_at(image, versions + index * 2) == version
                && image[symbol + 4] & 15 == 2
            {
                return Some((u64_at(image, symbol + 8), u64_at(image, symbol + 16)));
            }
            index = u32_at(image, hashes + 8 + (buckets + index) * 4);
        }
        None
    }

    #[test]
    fn functions_are_found_by_name_and_version() {
        let code: Vec<u8> = (0..0x180).map(|i| i as u8).collect();
        let image = image(&code, &FUNCTIONS).unwrap();
        assert_eq!(image.len(), PAGE);
        assert_eq!(&image[CODE_AT..CODE_AT + code.len()], &code[..]);
        for name in ["time", "__vdso_time"] {
            assert_eq!(look_up(&image, name), Some((CODE_AT, 16)));
        }
        for name in ["clock_gettime", "__vdso_clock_gettime"] {
            assert_eq!(look_up(&image, name), Some((CODE_AT + 0x100, 0x80)));
        }
        assert_eq!(look_up(&image, "getcpu"), None);
        // The kernel reads it as it reads programs.
        let header = crate::elf::Header::parse(&image[..crate::elf::HEADER]).unwrap();
        assert!(header.relocatable);
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        assert!(image(&[0; PAGE - CODE_AT + 1], &[]).is_none());
        assert!(image(&[0; 8], &FUNCTIONS).is_none());
        assert!(image(&[0; 0x180], &[FUNCTIONS[0]; 64]).is_none());
    }
}
