//! Which devices a container may open and make: OCI `linux.resources.devices` as a BPF program on
//! its cgroup.
//!
//! By ourselves, because libcontainer's own filter needs libbpf and libelf. Without one, a
//! container with CAP_MKNOD could open the disks of all others in its sandbox.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;

use serde_json::Value;

use crate::error::{Context, Error, Result};

const BLOCK: i32 = 1;
const CHAR: i32 = 2;
const MKNOD: i32 = 1;
const READ: i32 = 2;
const WRITE: i32 = 4;
const ALL: i32 = MKNOD | READ | WRITE;
/// Rules taken from one spec; the program stays far below the kernel's limit.
const MAX_RULES: usize = 1024;

/// One rule; `None` matches any.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Rule {
    allow: bool,
    kind: Option<i32>,
    major: Option<i32>,
    minor: Option<i32>,
    access: i32,
}

const fn allow(kind: i32, major: Option<i32>, minor: Option<i32>, access: i32) -> Rule {
    Rule {
        allow: true,
        kind: Some(kind),
        major,
        minor,
        access,
    }
}

/// What every container may do, as with other runtimes. Making a node is harmless without the
/// right to open it.
const ALWAYS: [Rule; 11] = [
    allow(CHAR, None, None, MKNOD),
    allow(BLOCK, None, None, MKNOD),
    allow(CHAR, Some(1), Some(3), ALL), // null
    allow(CHAR, Some(1), Some(5), ALL), // zero
    allow(CHAR, Some(1), Some(7), ALL), // full
    allow(CHAR, Some(1), Some(8), ALL), // random
    allow(CHAR, Some(1), Some(9), ALL), // urandom
    allow(CHAR, Some(5), Some(0), ALL), // tty
    allow(CHAR, Some(5), Some(1), ALL), // console
    allow(CHAR, Some(5), Some(2), ALL), // ptmx
    allow(CHAR, Some(136), None, ALL),  // pts
];

/// The rules of a spec, later ones winning; without a match the answer is no.
fn rules(devices: &Value) -> Result<Vec<Rule>> {
    let mut rules = Vec::new();
    let list = devices.as_array().map(Vec::as_slice).unwrap_or_default();
    if list.len() > MAX_RULES {
        return Err(Error::Limit(format!(
            "OCI spec: more than {MAX_RULES} device rules in one container"
        )));
    }
    for rule in list {
        let invalid =
            |what: &str| Error::Invalid(format!("OCI spec: linux.resources.devices: {what}"));
        let kind = match rule["type"].as_str() {
            None | Some("a" | "") => None,
            Some("b") => Some(BLOCK),
            Some("c" | "u") => Some(CHAR),
            Some(_) => return Err(invalid("type must be a, b, c or u")),
        };
        // -1 stands for any in some engines.
        let number = |key: &str| match rule[key].as_i64() {
            None | Some(-1) => Ok(None),
            Some(n) => i32::try_from(n)
                .ok()
                .filter(|n| *n >= 0)
                .map(Some)
                .ok_or_else(|| invalid("major or minor is not a device number")),
        };
        let mut access = 0;
        for letter in rule["access"].as_str().unwrap_or("rwm").bytes() {
            access |= match letter {
                b'r' => READ,
                b'w' => WRITE,
                b'm' => MKNOD,
                _ => return Err(invalid("access must be of r, w and m")),
            };
        }
        rules.push(Rule {
            allow: rule["allow"].as_bool().unwrap_or(false),
            kind,
            major: number("major")?,
            minor: number("minor")?,
            access,
        });
    }
    rules.extend(ALWAYS);
    Ok(rules)
}

/// One instruction of the kernel's BPF machine.
fn instruction(opcode: u8, dst: u8, src: u8, offset: i16, imm: i32) -> u64 {
    u64::from(opcode)
        | u64::from(dst | src << 4) << 8
        | u64::from(offset as u16) << 16
        | u64::from(imm as u32) << 32
}

/// The program: r2 kind, r3 access, r4 major, r5 minor; 32-bit operations throughout.
fn program(rules: &[Rule]) -> Vec<u64> {
    const LOAD: u8 = 0x61;
    const MOVE: u8 = 0xb4;
    const MOVE_REGISTER: u8 = 0xbc;
    const AND: u8 = 0x54;
    const SHIFT_RIGHT: u8 = 0x74;
    const JUMP_EQUAL: u8 = 0x16;
    const JUMP_NOT_EQUAL: u8 = 0x56;
    const JUMP_NOT_EQUAL_REGISTER: u8 = 0x5e;
    const EXIT: u8 = 0x95;

    let mut code = vec![
        instruction(LOAD, 2, 1, 0, 0),
        instruction(MOVE_REGISTER, 3, 2, 0, 0),
        instruction(AND, 2, 0, 0, 0xffff),
        instruction(SHIFT_RIGHT, 3, 0, 0, 16),
        instruction(LOAD, 4, 1, 4, 0),
        instruction(LOAD, 5, 1, 8, 0),
    ];
    for rule in rules.iter().rev() {
        // Conditions first, with jumps to the next rule patched in when its place is known.
        let mut block: Vec<(u8, u8, u8, i32)> = Vec::new();
        for (register, wanted) in [(2, rule.kind), (4, rule.major), (5, rule.minor)] {
            if let Some(wanted) = wanted {
                block.push((JUMP_NOT_EQUAL, register, 0, wanted));
            }
        }
        if rule.access != ALL {
            block.push((MOVE_REGISTER, 1, 3, 0));
            block.push((AND, 1, 0, rule.access));
            if rule.allow {
                // All that is asked for must be allowed,
                block.push((JUMP_NOT_EQUAL_REGISTER, 1, 3, 0));
            } else {
                // but one denied access is enough.
                block.push((JUMP_EQUAL, 1, 0, 0));
            }
        }
        let length = block.len() + 2;
        let always = block.is_empty();
        for (n, (opcode, dst, src, imm)) in block.into_iter().enumerate() {
            let jumps = matches!(
                opcode,
                JUMP_EQUAL | JUMP_NOT_EQUAL | JUMP_NOT_EQUAL_REGISTER
            );
            // At most seven instructions: fits.
            let offset = if jumps { (length - n - 1) as i16 } else { 0 };
            code.push(instruction(opcode, dst, src, offset, imm));
        }
        code.push(instruction(MOVE, 0, 0, 0, i32::from(rule.allow)));
        code.push(instruction(EXIT, 0, 0, 0, 0));
        if always {
            // What follows could not be reached, which the kernel refuses.
            return code;
        }
    }
    code.push(instruction(MOVE, 0, 0, 0, 0));
    code.push(instruction(EXIT, 0, 0, 0, 0));
    code
}

/// The head of bpf(2)'s argument for loading a program.
#[repr(C)]
#[derive(Default)]
struct Load {
    kind: u32,
    count: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log: u64,
    kernel_version: u32,
    flags: u32,
}

/// The same for attaching it.
#[repr(C)]
struct Attach {
    target: u32,
    program: u32,
    kind: u32,
    flags: u32,
}

fn bpf<T>(command: libc::c_int, argument: &T) -> io::Result<libc::c_long> {
    // The verifier gives up with EAGAIN when a signal is pending, and SIGCHLD often is. Its
    // handler has run by the next attempt.
    for _ in 0..100 {
        // SAFETY: the pointer and size are of one argument of the command's layout, whose own
        // pointers the caller keeps alive.
        let result =
            unsafe { libc::syscall(libc::SYS_bpf, command, &raw const *argument, size_of::<T>()) };
        if result >= 0 {
            return Ok(result);
        }
        let error = io::Error::last_os_error();
        if !matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EINTR)) {
            return Err(error);
        }
    }
    Err(io::Error::from_raw_os_error(libc::EAGAIN))
}

/// Puts the rules of an OCI `linux.resources.devices` on a cgroup.
pub fn restrict(cgroup: &Path, devices: &Value) -> Result<()> {
    let code = program(&rules(devices)?);
    let what = || "load the program that restricts the container's devices".to_owned();
    let license = c"Apache-2.0";
    let load = Load {
        kind: 15, // BPF_PROG_TYPE_CGROUP_DEVICE
        count: u32::try_from(code.len()).unwrap_or(u32::MAX),
        instructions: code.as_ptr() as u64,
        license: license.as_ptr() as u64,
        ..Load::default()
    };
    let program = bpf(5, &load)
        .and_then(|fd| i32::try_from(fd).map_err(io::Error::other))
        .context(what)?;
    // SAFETY: the kernel has just made this descriptor for us.
    let program = unsafe { OwnedFd::from_raw_fd(program) };
    let directory = File::open(cgroup).context(what)?;
    let attach = Attach {
        target: directory.as_raw_fd() as u32,
        program: program.as_raw_fd() as u32,
        kind: 6,  // BPF_CGROUP_DEVICE
        flags: 2, // BPF_F_ALLOW_MULTI: cgroups the container makes can only restrict further
    };
    bpf(8, &attach)
        .context(|| "restrict the container's devices".to_owned())
        .map(drop)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// What the program answers, by a small machine of our own.
    fn ask(rules: &[Rule], kind: i32, major: i32, minor: i32, access: i32) -> bool {
        let code = program(rules);
        let context = [kind | access << 16, major, minor];
        let mut r = [0i32; 11];
        let mut pc = 0;
        loop {
            let i = code[pc];
            let (dst, src) = ((i >> 8 & 15) as usize, (i >> 12 & 15) as usize);
            let (offset, imm) = ((i >> 16) as i16, (i >> 32) as i32);
            pc += 1;
            let jump = |taken: bool| if taken { offset as usize } else { 0 };
            match i as u8 {
                0x61 => r[dst] = context[offset as usize / 4],
                0xb4 => r[dst] = imm,
                0xbc => r[dst] = r[src],
                0x54 => r[dst] &= imm,
                0x74 => r[dst] = (r[dst] as u32 >> imm) as i32,
                0x16 => pc += jump(r[dst] == imm),
                0x56 => pc += jump(r[dst] != imm),
                0x5e => pc += jump(r[dst] != r[src]),
                0x95 => return r[0] == 1,
                other => panic!("{other:x}"),
            }
        }
    }

    #[test]
    fn later_rules_win_and_the_default_is_no() {
        let usual = rules(&json!([
            {"allow": false, "access": "rwm"},
            {"allow": true, "type": "c", "major": 10, "minor": 229, "access": "rw"},
            {"allow": true, "type": "b", "major": 254, "access": "r"},
        ]))
        .unwrap();
        let ask = |kind, major, minor, access| ask(&usual, kind, major, minor, access);
        assert!(ask(CHAR, 1, 3, READ | WRITE));
        assert!(ask(CHAR, 136, 77, READ | WRITE));
        assert!(ask(CHAR, 10, 229, READ | WRITE));
        assert!(!ask(CHAR, 10, 228, READ));
        assert!(!ask(BLOCK, 10, 229, READ));
        assert!(ask(BLOCK, 254, 16, READ));
        assert!(!ask(BLOCK, 254, 16, READ | WRITE));
        assert!(ask(BLOCK, 8, 0, MKNOD));
        assert!(!ask(CHAR, 1, 1, READ));
        assert!(!ask(CHAR, 1, 11, READ));
        // Privileged.
        let all = rules(&json!([{"allow": true, "access": "rwm"}])).unwrap();
        assert!(super::tests::ask(&all, BLOCK, 254, 0, ALL));
        // Allowed, then partly taken back.
        let partly = rules(&json!([
            {"allow": true, "type": "a", "access": "rwm"},
            {"allow": false, "type": "b", "major": 254, "minor": 0, "access": "w"},
        ]))
        .unwrap();
        assert!(super::tests::ask(&partly, BLOCK, 254, 0, READ));
        assert!(!super::tests::ask(&partly, BLOCK, 254, 0, READ | WRITE));
        // Nothing said: only what everybody may.
        let none = rules(&Value::Null).unwrap();
        assert!(!super::tests::ask(&none, BLOCK, 254, 0, READ));
        assert!(super::tests::ask(&none, CHAR, 1, 9, READ));
    }

    #[test]
    fn wrong_rules_are_refused() {
        for bad in [
            json!([{"allow": true, "type": "x"}]),
            json!([{"allow": true, "access": "q"}]),
            json!([{"allow": true, "major": -7}]),
            json!([{"allow": true, "minor": 1i64 << 40}]),
        ] {
            assert!(rules(&bad).is_err(), "{bad}");
        }
        assert!(rules(&json!(vec![json!({}); MAX_RULES + 1])).is_err());
    }
}
