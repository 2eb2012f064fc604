//! Disks that come and go while the guest runs.
//!
//! The host puts them into slots that the guest has from its boot, and names them by serial numbers
//! of which each is used once. A container's spec names them by the numbers that the devices have on
//! the host: those are replaced here, in the list of its devices as in the rules of who may open
//! what.

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use bulkhead_protocol::sandbox::Disk;
use nix::errno::Errno;
use nix::sys::stat::{Mode, SFlag, makedev, mknod};
use serde_json::{Value, json};

use crate::error::{Context, Error, Result};
use crate::paths::plain_absolute;

/// Where the kernel lists disks.
const SYS: &str = "/sys/block";
/// Nodes of disks that containers want elsewhere than in /dev. A device file of a tmpfs of ours
/// would do as well, if none of them were mounted without devices.
const NODES: &str = "/dev/bulkhead";
/// The host has put a disk in before it says so; what takes time is the guest's own driver.
const PATIENCE: Duration = Duration::from_secs(30);
/// First and longest pause between two looks.
const PAUSE: (Duration, Duration) = (Duration::from_millis(1), Duration::from_millis(50));
/// Disks that one container may name.
const MAX_DISKS: usize = 64;
/// Longest serial number.
const MAX_SERIAL: usize = 20;

/// A disk of this guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// Its device file.
    pub node: PathBuf,
    /// Its numbers here.
    pub number: (u32, u32),
}

/// A disk that has other numbers in a spec than here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mapped {
    /// In the spec.
    pub host: (u32, u32),
    /// Here.
    pub here: (u32, u32),
}

/// The disk with a serial number, if it is there.
fn look(sys: &Path, serial: &str) -> Option<Found> {
    let text = |path: PathBuf| fs::read_to_string(path).ok();
    for entry in fs::read_dir(sys).into_iter().flatten().flatten() {
        let path = entry.path();
        // An empty slot has none, and would answer with an error.
        let size = text(path.join("size")).and_then(|t| t.trim().parse::<u64>().ok());
        if size.is_none_or(|size| size == 0)
            || text(path.join("serial")).is_none_or(|t| t.trim_end_matches('\n') != serial)
        {
            continue;
        }
        let dev = text(path.join("dev"))?;
        let (major, minor) = dev.trim().split_once(':')?;
        return Some(Found {
            node: Path::new("/dev").join(entry.file_name()),
            number: (major.parse().ok()?, minor.parse().ok()?),
        });
    }
    None
}

/// Waits for a disk, and says whether it may be written.
pub async fn find(serial: &str, read_only: bool) -> Result<Found> {
    if serial.is_empty() || serial.len() > MAX_SERIAL {
        return Err(Error::Invalid(format!(
            "disk {:?}: a serial number has 1 to {MAX_SERIAL} bytes",
            serial.chars().take(40).collect::<String>()
        )));
    }
    let begin = Instant::now();
    let mut pause = PAUSE.0;
    let found = loop {
        if let Some(found) = look(Path::new(SYS), serial) {
            break found;
        }
        if begin.elapsed() > PATIENCE {
            return Err(Error::NotFound(format!(
                "disk {serial:?} has not come within {} s",
                PATIENCE.as_secs()
            )));
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(PAUSE.1);
    };
    set_read_only(&found.node, read_only)?;
    Ok(found)
}

/// The disks of a container.
pub async fn find_all(disks: &[Disk]) -> Result<Vec<Mapped>> {
    if disks.is_empty() {
        return Ok(Vec::new());
    }
    if !crate::in_guest() {
        return Err(Error::Unsupported(
            "disks of a guest: this is a host".to_owned(),
        ));
    }
    if disks.len() > MAX_DISKS {
        return Err(Error::Limit(format!(
            "more than {MAX_DISKS} disks of one container"
        )));
    }
    let mut all = Vec::new();
    for disk in disks {
        all.push(Mapped {
            host: (disk.major, disk.minor),
            here: find(&disk.serial, disk.read_only).await?.number,
        });
    }
    Ok(all)
}

/// The slot cannot tell (what it can do was settled before the disk came): without this, writes
/// would fail one by one, later, rather than the open.
fn set_read_only(node: &Path, read_only: bool) -> Result<()> {
    const BLKROSET: libc::c_ulong = 0x125d;
    let what = || format!("make {} read-only or writable", node.display());
    let disk = File::open(node).context(what)?;
    let value = libc::c_int::from(read_only);
    // SAFETY: BLKROSET reads one int, which lives through the call.
    Errno::result(unsafe { libc::ioctl(disk.as_raw_fd(), BLKROSET, &raw const value) })
        .context(what)?;
    Ok(())
}

/// Puts the guest's numbers in place of the host's. Disks that are wanted elsewhere than in /dev,
/// which is each container's own, become mounts: nothing is made in its image.
pub fn translate(spec: &mut Value, disks: &[Mapped], container: &str) -> Result<()> {
    let here = |entry: &Value| {
        let number = |key: &str| entry[key].as_u64().and_then(|n| u32::try_from(n).ok());
        let host = (number("major")?, number("minor")?);
        let is_block = entry["type"] == "b";
        let disk = disks.iter().find(|d| is_block && d.host == host)?;
        Some(disk.here)
    };
    let rules = spec.pointer_mut("/linux/resources/devices");
    for rule in rules.and_then(Value::as_array_mut).into_iter().flatten() {
        if let Some((major, minor)) = here(rule) {
            rule["major"] = json!(major);
            rule["minor"] = json!(minor);
        }
    }
    let mut elsewhere = Vec::new();
    if let Some(list) = spec
        .pointer_mut("/linux/devices")
        .and_then(Value::as_array_mut)
    {
        for device in list.iter_mut() {
            if let Some((major, minor)) = here(device) {
                device["major"] = json!(major);
                device["minor"] = json!(minor);
                if !in_dev(device) {
                    elsewhere.push(device.clone());
                }
            }
        }
        list.retain(|device| !elsewhere.contains(device));
    }
    for (n, device) in elsewhere.iter().enumerate() {
        let node = make_node(device, &Path::new(NODES).join(container), n)?;
        let mount = json!({
            "destination": device["path"], "type": "bind", "source": node,
            "options": ["bind", "rprivate"],
        });
        match spec.get_mut("mounts").and_then(Value::as_array_mut) {
            Some(mounts) => mounts.push(mount),
            None => spec["mounts"] = json!([mount]),
        }
    }
    Ok(())
}

/// Whether a device is wanted in /dev.
fn in_dev(device: &Value) -> bool {
    let path = device["path"].as_str().and_then(plain_absolute);
    path.is_some_and(|p| p.starts_with("/dev") && p != Path::new("/dev"))
}

/// Makes a device file as a spec asks for it.
fn make_node(device: &Value, directory: &Path, n: usize) -> Result<PathBuf> {
    let number = |key: &str| device[key].as_u64().unwrap_or(0);
    let id = |key: &str| u32::try_from(number(key)).unwrap_or(0);
    let what = || format!("make a device file for {}", device["path"]);
    fs::create_dir_all(directory).context(what)?;
    let node = directory.join(n.to_string());
    let mode = match device["fileMode"].as_u64() {
        Some(mode) => u32::try_from(mode & 0o777).unwrap_or(0o600),
        None => 0o600,
    };
    mknod(
        &node,
        SFlag::S_IFBLK,
        Mode::from_bits_truncate(mode),
        makedev(number("major"), number("minor")),
    )
    .context(what)?;
    fs::set_permissions(&node, fs::Permissions::from_mode(mode)).context(what)?;
    std::os::unix::fs::lchown(&node, Some(id("uid")), Some(id("gid"))).context(what)?;
    Ok(node)
}

/// Removes the device files of a container.
pub fn forget(container: &str) {
    // Ids are plain names.
    let _ = fs::remove_dir_all(Path::new(NODES).join(container));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks_are_found_by_serial_and_only_when_filled() {
        let sys = tempfile::tempdir().unwrap();
        let add = |name: &str, size: &str, serial: Option<&str>, dev: &str| {
            let dir = sys.path().join(name);
            fs::create_dir(&dir).unwrap();
            fs::write(dir.join("size"), size).unwrap();
            fs::write(dir.join("dev"), dev).unwrap();
            if let Some(serial) = serial {
                fs::write(dir.join("serial"), serial).unwrap();
            }
        };
        add("loop0", "8\n", None, "7:0\n");
        add("vda", "8\n", Some("\n"), "254:0\n");
        add("vdb", "0\n", Some("d1\n"), "254:16\n");
        add("vdc", "16\n", Some("d1\n"), "254:32\n");
        let found = Found {
            node: "/dev/vdc".into(),
            number: (254, 32),
        };
        assert_eq!(look(sys.path(), "d1"), Some(found));
        assert_eq!(look(sys.path(), "d2"), None);
        assert_eq!(look(Path::new("/nonexistent"), "d1"), None);
    }

    #[test]
    fn numbers_become_those_of_the_guest() {
        let disks = [
            Mapped {
                host: (7, 3),
                here: (254, 16),
            },
            // Not twice: this one has the number of the other here.
            Mapped {
                host: (254, 16),
                here: (254, 32),
            },
        ];
        let mut spec = json!({"linux": {
            "devices": [
                {"path": "/dev/xvda", "type": "b", "major": 7, "minor": 3},
                {"path": "/dev/other", "type": "b", "major": 254, "minor": 16},
                {"path": "/dev/null", "type": "c", "major": 7, "minor": 3},
            ],
            "resources": {"devices": [
                {"allow": false, "access": "rwm"},
                {"allow": true, "type": "b", "major": 7, "minor": 3, "access": "rm"},
                {"allow": true, "type": "b", "major": 7, "minor": 4, "access": "rm"},
            ]},
        }});
        translate(&mut spec, &disks, "c").unwrap();
        let numbers = |value: &Value| (value["major"].as_u64(), value["minor"].as_u64());
        let devices = &spec["linux"]["devices"];
        assert_eq!(numbers(&devices[0]), (Some(254), Some(16)));
        assert_eq!(numbers(&devices[1]), (Some(254), Some(32)));
        assert_eq!(numbers(&devices[2]), (Some(7), Some(3)));
        let rules = &spec["linux"]["resources"]["devices"];
        assert_eq!(numbers(&rules[0]), (None, None));
        assert_eq!(numbers(&rules[1]), (Some(254), Some(16)));
        assert_eq!(numbers(&rules[2]), (Some(7), Some(4)));
        assert!(spec.get("mounts").is_none());
        for odd in [
            json!({}),
            json!({"linux": 3}),
            json!({"linux": {"devices": {}}}),
        ] {
            translate(&mut odd.clone(), &disks, "c").unwrap();
        }
    }

    #[test]
    fn only_dev_is_the_containers_own() {
        let at = |path: &str| in_dev(&json!({"path": path}));
        assert!(at("/dev/xvda") && at("/dev/disk/a"));
        for path in ["/dev", "/x", "/devil", "/dev/../x", "dev/x", ""] {
            assert!(!at(path), "{path}");
        }
    }

    #[tokio::test]
    async fn hosts_have_none() {
        assert_eq!(find_all(&[]).await.unwrap(), []);
        assert!(find("", true).await.is_err());
        assert!(find(&"x".repeat(21), true).await.is_err());
    }
}
