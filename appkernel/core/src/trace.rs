//! How the arguments of system calls are shown, as strace shows them.

use alloc::format;
use alloc::string::String;

/// Arguments by letter: `d` a number with sign, `u` without, `x` in hexadecimal (flags, addresses),
/// `o` octal (modes), `f` a directory's descriptor or AT_FDCWD, `p` a path, `s` a signal.
#[rustfmt::skip]
const SIGNATURES: &[(u16, &str)] = &[
    (0, "dxu"), (1, "dxu"), (2, "pxo"), (3, "d"), (4, "px"), (5, "dx"), (6, "px"), (7, "xud"), (8, "ddu"),
    (9, "xuxxdx"), (10, "xux"), (11, "xu"), (12, "x"), (13, "sxxu"), (14, "uxxu"), (15, ""), (16, "dxx"),
    (17, "dxud"), (18, "dxud"), (19, "dxu"), (20, "dxu"), (21, "po"), (22, "x"), (23, "dxxxx"), (24, ""),
    (25, "xuuxx"), (26, "xux"), (27, "xux"), (28, "xud"), (32, "d"), (33, "dd"), (34, ""), (35, "xx"), (37, "u"),
    (38, "dxx"), (39, ""), (40, "ddxu"), (41, "dxd"), (42, "dxu"), (43, "dxx"), (44, "dxuxxu"), (45, "dxuxxx"),
    (46, "dxx"), (47, "dxx"), (48, "dd"), (49, "dxu"), (50, "dd"), (51, "dxx"), (52, "dxx"), (53, "dxdx"),
    (54, "dddxu"), (55, "dddxx"), (56, "xxxxx"), (57, ""), (58, ""), (59, "pxx"), (60, "d"), (61, "dxxx"),
    (62, "ds"), (63, "x"), (72, "ddx"), (73, "dx"), (74, "d"), (75, "d"), (76, "pd"), (77, "dd"), (79, "xu"),
    (80, "p"), (81, "d"), (82, "pp"), (83, "po"), (84, "p"), (85, "po"), (86, "pp"), (87, "p"), (88, "pp"),
    (89, "pxu"), (90, "po"), (91, "do"), (92, "pdd"), (93, "ddd"), (95, "o"), (96, "xx"), (97, "dx"), (98, "dx"),
    (99, "x"), (102, ""), (104, ""), (105, "u"), (106, "u"), (107, ""), (108, ""), (109, "dd"), (110, ""),
    (111, ""), (112, ""), (121, "d"), (124, "d"), (131, "xx"), (137, "px"), (138, "dx"), (157, "dxxxx"),
    (158, "xx"), (160, "dx"), (161, "p"), (165, "ppxxx"), (166, "px"), (186, ""), (188, "ppxux"), (189, "ppxux"),
    (190, "dpxux"), (191, "ppxu"), (192, "ppxu"), (193, "dpxu"), (194, "pxu"), (195, "pxu"), (196, "dxu"),
    (197, "pp"), (198, "pp"), (199, "dp"), (200, "ds"), (201, "x"),
    (202, "xxuxxu"), (203, "dux"), (204, "dux"), (217, "dxu"), (218, "x"), (228, "dx"), (229, "dx"),
    (230, "dxxx"), (231, "d"), (232, "dxdd"), (233, "dddx"), (234, "dds"), (247, "ddxxx"), (254, "dpx"),
    (257, "fpxo"), (258, "fpo"), (260, "fpddx"), (262, "fpxx"), (263, "fpx"), (264, "fpfp"), (265, "fpfpx"),
    (266, "pfp"), (267, "fpxu"), (268, "fpo"), (269, "fpo"), (270, "dxxxxx"), (271, "xuxxu"), (273, "xu"),
    (280, "fpxx"), (281, "dxddxu"), (283, "dx"), (284, "u"), (285, "dxdd"), (286, "dxxx"), (288, "dxxx"),
    (289, "dxux"), (290, "ux"), (291, "x"), (292, "ddx"), (293, "xx"), (294, "x"), (302, "ddxx"), (309, "xxx"),
    (310, "dxuxux"), (311, "dxuxux"),    (316, "fpfpx"), (318, "xux"), (319, "px"), (322, "fpxxx"), (324, "dxd"), (332, "fpxxx"), (334, "xudx"), (424, "dsxx"), (434, "dx"),
    (435, "xu"), (436, "uux"), (437, "fpxu"), (439, "fpox"),
];

/// How a call's arguments are shown: a letter for each. Of calls that nobody listed all six, in
/// hexadecimal.
pub fn signature(number: u64) -> &'static str {
    SIGNATURES
        .binary_search_by_key(&number, |(n, _)| u64::from(*n))
        .ok()
        .and_then(|i| SIGNATURES.get(i))
        .map_or("xxxxxx", |(_, letters)| letters)
}

/// An argument that is no path, by its letter.
pub fn number(letter: u8, value: u64) -> String {
    const AT_FDCWD: i32 = -100;
    match letter {
        b'f' if value as i32 == AT_FDCWD => String::from("AT_FDCWD"),
        b'f' | b'd' | b's' => format!("{}", value as i32),
        b'u' => format!("{value}"),
        b'o' => format!("0{:o}", value as u32),
        _ if value == 0 => String::from("0"),
        _ => format!("{value:#x}"),
    }
}

/// A path in quotes, of printable characters.
pub fn quoted(path: &[u8]) -> String {
    const LONGEST: usize = 64;
    let cut = if path.len() > LONGEST { "..." } else { "" };
    let shown = path.get(..LONGEST.min(path.len())).unwrap_or_default();
    format!("\"{}\"{cut}", shown.escape_ascii())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::syscalls;

    #[test]
    fn signatures_are_sorted_and_of_real_calls() {
        assert!(SIGNATURES.is_sorted_by(|a, b| a.0 < b.0));
        for (number, letters) in SIGNATURES {
            assert!(syscalls::find(u64::from(*number)).is_some(), "{number}");
            assert!(letters.len() <= 6, "{number}");
        }
        assert_eq!(signature(257), "fpxo");
        assert_eq!(signature(u64::MAX), "xxxxxx");
    }

    #[test]
    fn arguments_are_shown_as_programs_wrote_them() {
        let minus_100 = u64::from((-100i32).cast_unsigned());
        assert_eq!(number(b'f', minus_100), "AT_FDCWD");
        assert_eq!(number(b'd', u64::MAX), "-1");
        assert_eq!(number(b'o', 0o644), "0644");
        assert_eq!(number(b'x', 0x80000), "0x80000");
        assert_eq!(quoted(b"/a\n\x1b"), "\"/a\\n\\x1b\"");
        assert_eq!(quoted(&[b'x'; 100]).len(), 64 + 5);
    }
}
