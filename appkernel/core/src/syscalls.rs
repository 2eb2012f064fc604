//! The table of system calls: what is there, what is there in part, and what is not. It decides
//! what the kernel does with a number, and it is the compatibility document.

#[path = "syscalls_names.rs"]
mod names;

use alloc::format;
use alloc::string::String;

/// How far a call is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Support {
    /// As on Linux, as far as we know.
    Supported,
    /// With these gaps.
    Partial(&'static str),
    /// `ENOSYS`.
    Missing,
}

use Support::{Missing, Partial, Supported};

/// A system call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Call {
    /// Its number.
    pub number: u16,
    /// Its name.
    pub name: &'static str,
    /// How far it is there.
    pub support: Support,
}

const ROOT_ONLY: &str = "all programs are root; permissions are not checked";
const NO_TIMES: &str = "figures are zero";

/// Calls that are there, ascending.
#[rustfmt::skip]
const PRESENT: &[(u16, Support)] = &[
    (0, Supported), (1, Supported),
    (2, Partial("no device files, fifos or sockets of the image; flags of rare use are ignored")),
    (3, Supported), (4, Supported), (5, Supported), (6, Supported),
    (7, Partial("regular files, pipes and the console")),
    (8, Partial("no SEEK_DATA and SEEK_HOLE")),
    (9, Partial("no writable shared file mappings, no huge pages, flags of rare use are ignored")),
    (10, Supported), (11, Supported), (12, Supported),
    (13, Partial("no alternate stack")), (14, Supported), (15, Partial("no alternate stack")),
    (16, Partial("FIONREAD, FIONBIO, FIOCLEX; there is no terminal")),
    (17, Supported), (18, Supported), (19, Supported), (20, Supported),
    (21, Partial(ROOT_ONLY)), (22, Supported),
    (23, Partial("regular files, pipes and the console; the time left is not returned")),
    (24, Supported), (28, Partial("MADV_DONTNEED; others are hints")), (32, Supported), (33, Supported),
    (34, Supported), (35, Supported), (39, Supported),
    (40, Supported), (56, Partial("no namespaces; no CLONE_PARENT, CLONE_PIDFD; working directory is never shared by processes")),
    (57, Supported), (58, Supported), (59, Partial("EAGAIN while the process has other threads")),
    (60, Supported), (61, Partial("no stopped children, no resource usage")),
    (62, Partial("no stopping and continuing")), (63, Supported),
    (72, Partial("no owner, leases, seals or pipe sizes; record locks are not seen by the host")),
    (74, Supported), (75, Supported), (76, Supported), (77, Supported), (79, Supported), (80, Supported), (81, Supported),
    (82, Supported), (83, Supported), (84, Supported), (85, Supported), (86, Supported), (87, Supported),
    (88, Supported), (89, Partial("of /proc only /proc/self/exe")), (90, Partial(ROOT_ONLY)), (91, Partial(ROOT_ONLY)),
    (92, Partial(ROOT_ONLY)), (93, Partial(ROOT_ONLY)), (94, Partial(ROOT_ONLY)), (95, Supported),
    (96, Supported), (97, Partial("fixed limits")), (98, Partial(NO_TIMES)), (99, Partial("no load averages")),
    (100, Partial(NO_TIMES)), (102, Partial(ROOT_ONLY)), (104, Partial(ROOT_ONLY)),
    (105, Partial(ROOT_ONLY)), (106, Partial(ROOT_ONLY)), (107, Partial(ROOT_ONLY)), (108, Partial(ROOT_ONLY)),
    (109, Partial("no terminal, no job control")), (110, Supported), (111, Supported), (112, Supported),
    (113, Partial(ROOT_ONLY)), (114, Partial(ROOT_ONLY)), (115, Partial(ROOT_ONLY)),
    (117, Partial(ROOT_ONLY)), (118, Partial(ROOT_ONLY)), (119, Partial(ROOT_ONLY)), (120, Partial(ROOT_ONLY)),
    (121, Supported), (124, Supported), (127, Supported), (130, Supported),
    (131, Partial("accepted, not used: handlers run on the program's stack")),
    (137, Supported), (158, Supported), (186, Supported), (200, Supported), (201, Supported),
    (202, Partial("FUTEX_WAIT, FUTEX_WAKE and their bitset forms (any bit); within one process")),
    (204, Supported), (217, Supported), (218, Supported),
    (228, Partial("no processor time")), (229, Supported), (230, Supported), (231, Supported), (234, Supported),
    (257, Partial("as open")), (258, Supported), (260, Partial(ROOT_ONLY)), (262, Supported), (263, Supported), (264, Supported),
    (265, Supported), (266, Supported), (267, Partial("as readlink")), (268, Partial(ROOT_ONLY)), (269, Partial(ROOT_ONLY)),
    (270, Partial("as select")), (271, Partial("as poll")),
    (273, Partial("accepted, not used: robust futexes are not woken at a thread's end")),
    (280, Supported), (292, Supported), (293, Supported), (302, Partial("fixed limits, of the calling process")),
    (316, Partial("no flags")), (318, Supported), (439, Partial(ROOT_ONLY)),
];

/// The call of a number, if Linux has one.
pub fn find(number: u64) -> Option<Call> {
    let number = u16::try_from(number).ok()?;
    let index = names::NAMES
        .binary_search_by_key(&number, |(n, _)| *n)
        .ok()?;
    let support = PRESENT
        .binary_search_by_key(&number, |(n, _)| *n)
        .ok()
        .and_then(|i| PRESENT.get(i))
        .map_or(Missing, |(_, support)| *support);
    let (number, name) = *names::NAMES.get(index)?;
    Some(Call {
        number,
        name,
        support,
    })
}

/// All calls, by number.
pub fn all() -> impl Iterator<Item = Call> {
    names::NAMES
        .iter()
        .filter_map(|(number, _)| find(u64::from(*number)))
}

/// The table as a document.
pub fn document() -> String {
    let mut text = String::from(
        "# System calls of the app kernel\n\n\
         Made from the kernel's own table (`appkernel/core/src/syscalls.rs`); a call that is absent \
         returns `ENOSYS` and is counted.\n\n",
    );
    let count = |f: fn(&Support) -> bool| all().filter(|c| f(&c.support)).count();
    text += &format!(
        "{} are there, {} in part, {} are absent.\n\n| number | call | |\n|---|---|---|\n",
        count(|s| *s == Supported),
        count(|s| matches!(s, Partial(_))),
        count(|s| *s == Missing)
    );
    for call in all() {
        let what = match call.support {
            Supported => "yes",
            Partial(gap) => &format!("in part: {gap}"),
            Missing => "absent",
        };
        text += &format!("| {} | {} | {what} |\n", call.number, call.name);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_sorted_and_names_real_calls() {
        assert!(PRESENT.is_sorted_by(|a, b| a.0 < b.0));
        assert!(names::NAMES.is_sorted_by(|a, b| a.0 < b.0));
        assert!(PRESENT.iter().all(|(n, _)| find(u64::from(*n)).is_some()));
        assert_eq!(find(59).unwrap().name, "execve");
        assert_eq!(find(101).unwrap().support, Missing);
        assert_eq!(find(u64::MAX), None);
    }

    #[test]
    fn the_document_is_current() {
        let path = concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/../../docs/appkernel-compat.md"
        );
        if std::env::var_os("BULKHEAD_UPDATE_DOCS").is_some() {
            std::fs::write(path, document()).unwrap();
        }
        let found = std::fs::read_to_string(path).unwrap_or_default();
        assert!(
            found == document(),
            "docs/appkernel-compat.md is old: run the test with BULKHEAD_UPDATE_DOCS=1"
        );
    }
}
