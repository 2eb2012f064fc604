//! Values as people write them on a command line.

use std::path::PathBuf;

use crate::hint::nearest;

/// `512M`, `1G`, `1024` (MiB) or `268435456b` as MiB.
///
/// # Errors
/// Says what would do.
pub fn memory_mib(text: &str) -> Result<u64, String> {
    let split = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    let (digits, unit) = text.split_at(split);
    let number: u64 = digits
        .parse()
        .map_err(|_| format!("{text:?} is not a size: give for example 512M or 2G"))?;
    let bytes_shift = match unit.to_ascii_lowercase().as_str() {
        "" | "m" | "mb" | "mib" => 20,
        "g" | "gb" | "gib" => 30,
        "k" | "kb" | "kib" => 10,
        "b" => 0,
        _ => {
            return Err(format!(
                "{text:?} has the unknown unit {unit:?}: use K, M or G"
            ));
        }
    };
    let bytes = number
        .checked_mul(1 << bytes_shift)
        .ok_or_else(|| format!("{text:?} is too large"))?;
    if bytes == 0 {
        return Err("0 is no memory: give for example 512M".into());
    }
    Ok(bytes.div_ceil(1 << 20))
}

/// A directory or file of the host for the guest: `HOST:GUEST[:ro|rw]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Volume {
    /// Path on the host, as given.
    pub host: PathBuf,
    /// Absolute path in the container.
    pub guest: String,
    /// The container cannot write.
    pub read_only: bool,
}

/// Parses `HOST:GUEST[:ro|rw]`.
///
/// # Errors
/// Says which part is wrong.
pub fn volume(text: &str) -> Result<Volume, String> {
    let parts: Vec<&str> = text.split(':').collect();
    let (host, guest, mode) = match parts.as_slice() {
        [host, guest] => (*host, *guest, "rw"),
        [host, guest, mode] => (*host, *guest, *mode),
        _ => return Err(format!("{text:?}: give HOST:GUEST or HOST:GUEST:ro")),
    };
    if host.is_empty() {
        return Err(format!("{text:?}: the host's path is empty"));
    }
    if !guest.starts_with('/') || guest == "/" {
        return Err(format!(
            "{text:?}: the guest's path {guest:?} must be absolute and not the root"
        ));
    }
    if guest.split('/').any(|part| part == "..") {
        return Err(format!("{text:?}: the guest's path must not hold '..'"));
    }
    let read_only = match mode {
        "ro" => true,
        "rw" => false,
        other => return Err(format!("{text:?}: unknown mode {other:?}: give ro or rw")),
    };
    Ok(Volume {
        host: host.into(),
        guest: guest.to_owned(),
        read_only,
    })
}

/// Signals by name; numbers are x86-64's, which the guest is.
const SIGNALS: [(&str, u32); 31] = [
    ("HUP", 1),
    ("INT", 2),
    ("QUIT", 3),
    ("ILL", 4),
    ("TRAP", 5),
    ("ABRT", 6),
    ("BUS", 7),
    ("FPE", 8),
    ("KILL", 9),
    ("USR1", 10),
    ("SEGV", 11),
    ("USR2", 12),
    ("PIPE", 13),
    ("ALRM", 14),
    ("TERM", 15),
    ("STKFLT", 16),
    ("CHLD", 17),
    ("CONT", 18),
    ("STOP", 19),
    ("TSTP", 20),
    ("TTIN", 21),
    ("TTOU", 22),
    ("URG", 23),
    ("XCPU", 24),
    ("XFSZ", 25),
    ("VTALRM", 26),
    ("PROF", 27),
    ("WINCH", 28),
    ("IO", 29),
    ("PWR", 30),
    ("SYS", 31),
];

/// `TERM`, `SIGTERM`, `term` or `15`.
///
/// # Errors
/// Names the nearest signal.
pub fn signal(text: &str) -> Result<u32, String> {
    if let Ok(number) = text.parse::<u32>() {
        return if (1..=64).contains(&number) {
            Ok(number)
        } else {
            Err(format!("signal {number} does not exist: give 1 to 64"))
        };
    }
    let upper = text.to_ascii_uppercase();
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    if let Some((_, number)) = SIGNALS.iter().find(|(n, _)| *n == name) {
        return Ok(*number);
    }
    let hint = nearest(name, SIGNALS.iter().map(|(n, _)| *n))
        .map(|n| format!(" (did you mean {n}?)"))
        .unwrap_or_default();
    Err(format!("unknown signal {text:?}{hint}"))
}

/// Bytes for people: `61M`, `1.5G`.
pub fn bytes(n: u64) -> String {
    const UNITS: [&str; 5] = ["B", "K", "M", "G", "T"];
    let mut unit = 0;
    let mut whole = n;
    let mut rest = 0;
    while whole >= 1024 && unit < UNITS.len() - 1 {
        rest = whole % 1024;
        whole /= 1024;
        unit += 1;
    }
    if unit > 0 && whole < 10 && rest >= 103 {
        format!("{whole}.{}{}", rest * 10 / 1024, UNITS[unit])
    } else {
        format!("{whole}{}", UNITS[unit])
    }
}

/// A duration for people: `9s`, `2m`, `4h`, `3d`.
pub fn uptime(seconds: u64) -> String {
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{}m", seconds / 60),
        3600..86_400 => format!("{}h", seconds / 3600),
        _ => format!("{}d", seconds / 86_400),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        assert_eq!(memory_mib("512M"), Ok(512));
        assert_eq!(memory_mib("2g"), Ok(2048));
        assert_eq!(memory_mib("300"), Ok(300));
        assert_eq!(memory_mib("1b"), Ok(1));
        for bad in [
            "",
            "M",
            "12x",
            "0",
            "99999999999999999999",
            "18446744073709551615G",
        ] {
            assert!(memory_mib(bad).is_err(), "{bad}");
        }
        assert_eq!(
            (bytes(1536), bytes(61 << 20), bytes(5)),
            ("1.5K".into(), "61M".into(), "5B".into())
        );
    }

    #[test]
    fn volumes() {
        assert_eq!(
            volume("./d:/data:ro"),
            Ok(Volume {
                host: "./d".into(),
                guest: "/data".into(),
                read_only: true
            })
        );
        for bad in ["x", ":/a", "a:b", "a:/", "a:/b:rx", "a:/b:ro:z", "a:/../b"] {
            assert!(volume(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn signals() {
        assert_eq!(
            (signal("term"), signal("SIGKILL"), signal("2")),
            (Ok(15), Ok(9), Ok(2))
        );
        assert!(
            signal("TREM")
                .expect_err("typo")
                .contains("did you mean TERM")
        );
        assert!(signal("0").is_err() && signal("65").is_err());
    }
}
