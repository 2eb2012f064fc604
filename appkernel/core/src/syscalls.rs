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

const REFUSED: &str = "EPERM: for administrators of a machine";
const CAPABILITIES: &str = "sets are kept as on Linux; those for users, groups and the bounding set are checked, for the rest root may what containers may; no ambient ones";
const NO_ACL: &str = "mode bits and owners only: no access control lists, no capabilities of files";
const CPU_ONLY: &str = "processor time, all of it as user time, and most memory; the rest is zero";
const EXTENDED: &str = "user.* and security.capability: no access control lists; files of programs get no capabilities; values of a share's files have at most 65,000 bytes";
const WATCHED: &str =
    "paths are watched: other names of a file, and changes that the host makes, are not seen";
const LIMITS: &str =
    "kept: NOFILE (at most 4096), NPROC, FSIZE; others are remembered and not heeded";

/// Calls that are there, ascending.
#[rustfmt::skip]
const PRESENT: &[(u16, Support)] = &[
    (0, Supported), (1, Supported),
    (2, Partial("no device files of the image but the usual ones; flags of rare use are ignored")),
    (3, Supported), (4, Supported), (5, Supported), (6, Supported), (7, Supported),
    (8, Partial("holes are not found: all of a file is data")),
    (9, Partial("no huge pages, flags of rare use are ignored")),
    (10, Supported), (11, Supported), (12, Supported),
    (13, Supported), (14, Supported), (15, Supported),
    (16, Partial("FIONREAD, FIONBIO, FIOCLEX, FIONCLEX, and the usual calls on terminals")),
    (17, Supported), (18, Supported), (19, Supported), (20, Supported),
    (21, Partial(NO_ACL)), (22, Supported),
    (23, Partial("the time left is not returned; no exceptional conditions")),
    (24, Supported), (25, Partial("no MREMAP_DONTUNMAP")), (26, Supported), (27, Supported),
    (28, Partial("MADV_DONTNEED, MADV_DONTFORK, MADV_WIPEONFORK; others are hints")), (29, Partial("no huge pages")), (30, Supported), (31, Supported), (32, Supported), (33, Supported),
    (34, Supported), (35, Supported), (36, Partial("all processor time counts as user time")), (37, Supported), (38, Partial("all processor time counts as user time")), (39, Supported),
    (40, Supported), (41, Partial("AF_UNIX, AF_INET, AF_INET6: streams, datagrams, ICMP (as ping and as raw sockets); of AF_NETLINK the questions about interfaces; no raw sockets of other protocols")), (42, Supported), (43, Supported), (44, Partial("no out-of-band data")), (45, Partial("no out-of-band data")), (46, Partial("files but unix sockets are passed, credentials are not")), (47, Partial("as sendmsg")), (48, Supported), (49, Supported), (50, Supported), (51, Supported), (52, Supported), (53, Supported), (54, Partial("time limits, linger, address reuse, no-delay and v6-only have effect; others are kept and given back")), (55, Supported), (56, Partial("no namespaces; working directory is never shared by processes")),
    (57, Supported), (58, Supported), (59, Partial("EAGAIN when the first thread of several has ended")),
    (60, Supported), (61, Partial(CPU_ONLY)),
    (62, Supported), (63, Supported),
    (64, Supported), (65, Supported), (66, Supported), (67, Supported), (68, Supported), (69, Supported), (70, Supported), (71, Supported), 
    (72, Partial("owner, signal and leases are kept, and no signals are sent; record locks are not seen by the host")), (73, Partial("not seen by the host")), (74, Supported), (75, Supported), (76, Supported), (77, Supported), (78, Supported), (79, Supported), (80, Supported), (81, Supported),
    (82, Supported), (83, Supported), (84, Supported), (85, Supported), (86, Supported), (87, Supported),
    (88, Supported), (89, Supported), (90, Partial(NO_ACL)), (91, Partial(NO_ACL)),
    (92, Partial(NO_ACL)), (93, Partial(NO_ACL)), (94, Partial(NO_ACL)), (95, Supported),
    (96, Supported), (97, Partial(LIMITS)), (98, Partial(CPU_ONLY)), (99, Partial("no load averages")),
    (100, Partial(CPU_ONLY)), (102, Supported), (103, Partial(REFUSED)), (104, Supported),
    (105, Supported), (106, Supported), (107, Supported), (108, Supported),
    (109, Supported), (110, Supported), (111, Supported), (112, Supported),
    (113, Supported), (114, Supported), (115, Supported), (116, Supported),
    (117, Supported), (118, Supported), (119, Supported), (120, Supported),
    (121, Supported), (122, Supported), 
    (123, Supported), (124, Supported), (125, Partial(CAPABILITIES)), (126, Partial(CAPABILITIES)),
    (127, Supported), (128, Supported), (129, Supported), (130, Supported), (131, Supported),
    (132, Supported), (133, Partial("fifos, sockets, and the usual devices in memory")),
    (135, Partial("ADDR_NO_RANDOMIZE has effect, others are kept and given back")), (137, Supported), (138, Supported), (140, Partial("kept and given back; all are scheduled the same")), (141, Partial("kept and given back; all are scheduled the same")), (142, Partial("kept and given back; all are scheduled the same")), (143, Partial("kept and given back; all are scheduled the same")), (144, Partial("kept and given back; all are scheduled the same")), (145, Partial("kept and given back; all are scheduled the same")), (146, Supported), (147, Supported), (148, Partial("kept and given back; all are scheduled the same")), (149, Supported), (150, Supported), (151, Partial("pages come when they are touched")), (152, Supported), (153, Partial(REFUSED)), (155, Partial(REFUSED)), (157, Partial("names; the usual others are accepted and change nothing")), (158, Supported), (159, Partial("can be read, not set")), (160, Partial(LIMITS)), (161, Partial("files that were opened before are left as they are")), (162, Supported), (163, Partial(REFUSED)), (164, Partial(REFUSED)), (165, Partial("tmpfs, proc, sysfs and binds; the container's own mounts stay as they are")), (166, Supported), (167, Partial(REFUSED)), (168, Partial(REFUSED)), (169, Partial(REFUSED)), (170, Supported), (171, Supported), (172, Partial(REFUSED)), (173, Partial(REFUSED)), (175, Partial(REFUSED)), (176, Partial(REFUSED)), (186, Supported), (187, Partial("accepted, changes nothing")), (188, Partial(EXTENDED)), (189, Partial(EXTENDED)), (190, Partial(EXTENDED)), (191, Partial(EXTENDED)), (192, Partial(EXTENDED)), (193, Partial(EXTENDED)), (194, Partial(EXTENDED)), (195, Partial(EXTENDED)), (196, Partial(EXTENDED)), (197, Partial(EXTENDED)), (198, Partial(EXTENDED)), (199, Partial(EXTENDED)), (200, Supported), (201, Supported),
    (202, Partial("FUTEX_WAIT, FUTEX_WAKE, their bitset forms (any bit), FUTEX_REQUEUE and FUTEX_CMP_REQUEUE")),
    (203, Supported), (204, Supported), (213, Supported), (217, Supported), (218, Supported),
    (220, Supported), (221, Partial("accepted, changes nothing")), (222, Supported), (223, Supported), (224, Supported), (225, Supported), (226, Supported), (227, Partial(REFUSED)), (228, Supported), (229, Supported), (230, Supported), (231, Supported), (232, Supported), (233, Partial("one epoll within another, no more")), (234, Supported),
    (235, Supported), (246, Partial(REFUSED)), (247, Partial(CPU_ONLY)),
    (251, Partial("kept and given back; all are scheduled the same")), (252, Partial("kept and given back; all are scheduled the same")), (253, Supported), (254, Partial(WATCHED)), (255, Supported), (257, Partial("as open")), (258, Supported), (259, Partial("as mknod")), (260, Partial(NO_ACL)), (261, Supported), (262, Supported), (263, Supported), (264, Supported),
    (265, Supported), (266, Supported), (267, Supported), (268, Partial(NO_ACL)), (269, Partial(NO_ACL)),
    (270, Partial("as select")), (271, Supported),
    (272, Partial("files only: no namespaces")), (273, Partial("not at execve")), (274, Supported), (275, Supported), (276, Supported), (277, Partial("always all of the file")),
    (280, Supported), (281, Supported), (282, Supported), (283, Partial("not told when the clock is set")), (284, Supported), (285, Partial("the size only: nothing is reserved; holes are punched into files in memory only")), (286, Supported), (287, Supported), (288, Supported), (289, Supported), (290, Supported), (291, Supported), (292, Supported), (293, Supported), (294, Supported), (295, Supported), (296, Supported), (297, Supported), (299, Partial("the time limit is not heeded")), (302, Partial(LIMITS)), (304, Partial(REFUSED)),
    (305, Partial("can be read, not set")), (306, Supported), (307, Supported), (309, Supported), (310, Supported), (311, Supported), (313, Partial(REFUSED)), (314, Partial("kept and given back; all are scheduled the same")), (315, Partial("kept and given back; all are scheduled the same")), (316, Partial("no RENAME_WHITEOUT")), (318, Supported), (319, Partial("no seals, no huge pages")), (320, Partial(REFUSED)), (322, Partial("as execve")), (324, Supported), (325, Supported), (326, Supported), (327, Partial("flags change nothing but where it is written")), (328, Partial("flags change nothing but where it is written")), (332, Partial("no birth times, no mount ids")), (424, Supported), (434, Supported), (435, Partial("as clone; no chosen numbers, no cgroup")), (436, Supported), (437, Partial("ENOSYS when the walk is to be restricted")), (438, Partial("of processes that the caller may send signals to")), (439, Partial(NO_ACL)), (441, Supported),
];

/// Numbers of calls are below.
pub const NUMBERS: usize = 512;

/// By number: every call looks here.
static TABLE: [Support; NUMBERS] = {
    let mut table = [Missing; NUMBERS];
    let mut i = 0;
    while i < PRESENT.len() {
        table[PRESENT[i].0 as usize] = PRESENT[i].1;
        i += 1;
    }
    table
};

/// How far the call of a number is there.
pub fn support(number: u64) -> Support {
    let index = usize::try_from(number).unwrap_or(usize::MAX);
    TABLE.get(index).copied().unwrap_or(Missing)
}

/// Whether the call of a number is refused to everybody.
pub fn is_refused(number: u64) -> bool {
    support(number) == Partial(REFUSED)
}

/// The call of a number, if Linux has one.
pub fn find(number: u64) -> Option<Call> {
    let index = names::NAMES
        .binary_search_by_key(&number, |(n, _)| u64::from(*n))
        .ok()?;
    let (number, name) = *names::NAMES.get(index)?;
    Some(Call {
        number,
        name,
        support: support(number.into()),
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
        assert_eq!(support(u64::MAX), Missing);
        assert!(PRESENT.iter().all(|(n, s)| support(u64::from(*n)) == *s));
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
