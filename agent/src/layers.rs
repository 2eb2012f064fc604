//! Roots of containers whose layers are erofs images on a disk of the guest.
//!
//! The layers of an image lie one behind the other on one disk, which the host puts in as a
//! container comes. Each becomes a partition, is mounted once for all containers that have it, and
//! an overlay joins them below the container's own files, which stay on the host's share.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bulkhead_protocol::types;
use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use tokio::sync::Mutex;

use crate::disks;
use crate::error::{Context, Error, Result};
use crate::mounts::{RUN_DIR, Shares, unmount_all, with_short_layers};
use crate::paths::by_fd;

/// Layers of one image; a disk has no more partitions for us.
const MAX_LAYERS: usize = 120;
/// How often a partition is tried that is still in use: the last process of a container has gone,
/// and what it had mounted goes with it, soon.
const ATTEMPTS: u32 = 100;
const PAUSE: Duration = Duration::from_millis(20);

/// What a mount of layers asks for.
#[derive(Debug, Default, PartialEq, Eq)]
struct Wanted {
    /// Start and length in bytes, topmost first.
    layers: Vec<(u64, u64)>,
    upper: String,
    work: String,
}

impl Wanted {
    fn parse(options: &[String]) -> Result<Self> {
        let mut wanted = Self::default();
        for option in options {
            let invalid = || Error::Invalid(format!("layers of a root: option {option:?}"));
            let (key, value) = option.split_once('=').ok_or_else(invalid)?;
            match key {
                "layer" => {
                    let (start, length) = value.split_once(':').ok_or_else(invalid)?;
                    let number = |text: &str| {
                        let n = text.parse::<u64>().ok();
                        n.filter(|n| n.is_multiple_of(512) && i64::try_from(*n).is_ok())
                    };
                    let start = number(start).ok_or_else(invalid)?;
                    let length = number(length).filter(|n| *n > 0).ok_or_else(invalid)?;
                    wanted.layers.push((start, length));
                }
                "upper" => wanted.upper = value.to_owned(),
                "work" => wanted.work = value.to_owned(),
                _ => return Err(invalid()),
            }
        }
        if wanted.layers.is_empty()
            || wanted.layers.len() > MAX_LAYERS
            || wanted.upper.is_empty()
            || wanted.work.is_empty()
        {
            return Err(Error::Invalid(format!(
                "layers of a root: 1 to {MAX_LAYERS}, an upper layer and its work directory are \
                 needed"
            )));
        }
        Ok(wanted)
    }
}

/// Mounted layers of one disk.
#[derive(Debug)]
struct Set {
    disk: PathBuf,
    mounted: Vec<PathBuf>,
    partitions: i32,
    /// Containers.
    users: BTreeSet<String>,
}

/// By serial number.
static SETS: Mutex<BTreeMap<String, Set>> = Mutex::const_new(BTreeMap::new());

/// Mounts a container's root.
pub async fn mount_root(
    container: &str,
    m: &types::Mount,
    shares: &Shares,
    root: &Path,
) -> Result<()> {
    let wanted = Wanted::parse(&m.options)?;
    if !crate::in_guest() {
        return Err(Error::Unsupported(
            "layers on disks of a guest: this is a host".to_owned(),
        ));
    }
    let disk = disks::find(&m.source, true).await?;
    let mut sets = SETS.lock().await;
    if !sets.contains_key(&m.source) {
        let set = mount_layers(&m.source, &disk.node, &wanted.layers).await?;
        sets.insert(m.source.clone(), set);
    }
    let Some(set) = sets.get_mut(&m.source) else {
        return Ok(());
    };
    // From here on the caller's clean-up finds it.
    set.users.insert(container.to_owned());
    let lower: Vec<String> = set
        .mounted
        .iter()
        .map(|p| p.display().to_string())
        .collect();
    let open = |path: &str| {
        shares.open(path)?.ok_or_else(|| {
            Error::Invalid(format!(
                "layers of a root: {path:?} is below no mounted share"
            ))
        })
    };
    let (upper, work) = (open(&wanted.upper)?, open(&wanted.work)?);
    // What a container writes is to be whole on the host, and readable there by any overlay.
    let data = format!(
        "lowerdir={},upperdir={},workdir={},index=off,metacopy=off,redirect_dir=off,xino=off",
        lower.join(":"),
        by_fd(&upper).display(),
        by_fd(&work).display(),
    );
    let what = || format!("mount an overlay of {} layers", lower.len());
    let data = with_short_layers(&data).context(what)?;
    mount(
        Some("overlay"),
        root,
        Some("overlay"),
        MsFlags::empty(),
        Some(data.as_str()),
    )
    .context(what)
}

async fn mount_layers(serial: &str, disk: &Path, layers: &[(u64, u64)]) -> Result<Set> {
    let mut set = Set {
        disk: disk.to_owned(),
        mounted: Vec::new(),
        partitions: 0,
        users: BTreeSet::new(),
    };
    let made = mount_each(&mut set, serial, layers).await;
    if let Err(error) = made {
        set.remove().await;
        return Err(error);
    }
    Ok(set)
}

async fn mount_each(set: &mut Set, serial: &str, layers: &[(u64, u64)]) -> Result<()> {
    // The slot's last disk may have had some that were in use until now.
    let there = partitions(&set.disk);
    for number in there {
        remove_partition(&set.disk, number).await?;
    }
    for (index, (start, length)) in layers.iter().enumerate() {
        let number = set.partitions + 1;
        let what = || format!("make a partition for layer {index} of disk {serial:?}");
        change_partition(&set.disk, Change::Add, number, *start, *length).context(what)?;
        set.partitions = number;
        let target = Path::new(RUN_DIR).join("layers").join(serial);
        let target = target.join(index.to_string());
        fs::create_dir_all(&target).context(what)?;
        let partition = format!("{}{number}", set.disk.display());
        mount(
            Some(partition.as_str()),
            &target,
            Some("erofs"),
            MsFlags::MS_RDONLY,
            None::<&str>,
        )
        .context(|| format!("mount layer {index} of disk {serial:?}: is it an erofs image?"))?;
        set.mounted.push(target);
    }
    Ok(())
}

impl Set {
    async fn remove(self) {
        for target in &self.mounted {
            unmount_all(target);
            let _ = fs::remove_dir(target);
        }
        if let Some(directory) = self.mounted.first().and_then(|m| m.parent()) {
            let _ = fs::remove_dir(directory);
        }
        for number in 1..=self.partitions {
            if let Err(error) = remove_partition(&self.disk, number).await {
                crate::error!("{error}");
            }
        }
    }
}

/// A container has gone, and its root is unmounted: so are layers that only it had.
pub async fn forget(container: &str) {
    let mut sets = SETS.lock().await;
    let mut unused = Vec::new();
    for (serial, set) in sets.iter_mut() {
        if set.users.remove(container) && set.users.is_empty() {
            unused.push(serial.clone());
        }
    }
    for serial in unused {
        if let Some(set) = sets.remove(&serial) {
            set.remove().await;
        }
    }
}

/// Numbers of a disk's partitions.
fn partitions(disk: &Path) -> Vec<i32> {
    let name = disk.file_name().unwrap_or_default();
    let sys = Path::new("/sys/block").join(name);
    fs::read_dir(sys)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| fs::read_to_string(entry.path().join("partition")).ok())
        .filter_map(|text| text.trim().parse().ok())
        .collect()
}

/// What is done to a partition: operations of BLKPG.
#[derive(Clone, Copy)]
#[repr(i32)]
enum Change {
    Add = 1,
    Remove = 2,
}

/// `struct blkpg_partition`.
#[repr(C)]
struct BlkpgPartition {
    start: i64,
    length: i64,
    number: libc::c_int,
    names: [u8; 128],
}

/// `struct blkpg_ioctl_arg`.
#[repr(C)]
struct BlkpgArgument {
    operation: libc::c_int,
    flags: libc::c_int,
    length: libc::c_int,
    data: *const BlkpgPartition,
}

fn change_partition(
    disk: &Path,
    change: Change,
    number: i32,
    start: u64,
    length: u64,
) -> std::io::Result<()> {
    const BLKPG: libc::c_ulong = 0x1269;
    let disk = File::open(disk)?;
    let byte = |n: u64| i64::try_from(n).map_err(std::io::Error::other);
    let partition = BlkpgPartition {
        start: byte(start)?,
        length: byte(length)?,
        number,
        names: [0; 128],
    };
    let argument = BlkpgArgument {
        operation: change as libc::c_int,
        flags: 0,
        length: size_of::<BlkpgPartition>() as libc::c_int,
        data: &raw const partition,
    };
    // SAFETY: BLKPG reads the argument and the partition that it points to; both are laid out as
    // the kernel's and live through the call.
    Errno::result(unsafe { libc::ioctl(disk.as_raw_fd(), BLKPG, &raw const argument) })?;
    Ok(())
}

/// Removes a partition, once nobody has it open.
async fn remove_partition(disk: &Path, number: i32) -> Result<()> {
    let mut attempt = 0;
    loop {
        match change_partition(disk, Change::Remove, number, 0, 0) {
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) && attempt < ATTEMPTS => {
                attempt += 1;
                tokio::time::sleep(PAUSE).await;
            }
            other => {
                return other
                    .context(|| format!("remove partition {number} of {}", disk.display()));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(options: &[&str]) -> Result<Wanted> {
        let options: Vec<String> = options.iter().map(|o| (*o).to_owned()).collect();
        Wanted::parse(&options)
    }

    #[test]
    fn options_say_where_layers_are() {
        let wanted = parse(&[
            "layer=0:4096",
            "layer=1048576:512",
            "upper=/a/fs",
            "work=/a/work",
        ]);
        let expected = Wanted {
            layers: vec![(0, 4096), (1_048_576, 512)],
            upper: "/a/fs".into(),
            work: "/a/work".into(),
        };
        assert_eq!(wanted.unwrap(), expected);
        for bad in [
            "layer=0",
            "layer=1:512",
            "layer=0:0",
            "layer=0:513",
            "layer=-512:512",
            "layer=0:18446744073709551104",
            "upper",
            "other=1",
        ] {
            let wanted = parse(&["layer=0:512", "upper=/a", "work=/b", bad]);
            assert!(matches!(wanted, Err(Error::Invalid(_))), "{bad}");
        }
        for missing in [
            &["upper=/a", "work=/b"][..],
            &["layer=0:512", "work=/b"],
            &["layer=0:512", "upper=/a"],
        ] {
            assert!(parse(missing).is_err());
        }
        let many = vec!["layer=0:512"; MAX_LAYERS + 1];
        assert!(parse(&[&many[..], &["upper=/a", "work=/b"]].concat()).is_err());
    }

    /// What the kernel's headers say.
    #[test]
    fn structures_are_the_kernels() {
        assert_eq!(size_of::<BlkpgPartition>(), 152);
        assert_eq!(size_of::<BlkpgArgument>(), 24);
        assert_eq!(std::mem::offset_of!(BlkpgArgument, data), 16);
    }
}
