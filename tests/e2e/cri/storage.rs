//! What pods in VMs get as disks: block devices of the host, and images of containerd's erofs
//! snapshotter.

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use bulkhead_tests::cri::containerd::{APP, APP_EROFS, EROFS, Node};
use bulkhead_tests::cri::proto::*;
use bulkhead_tests::cri::{TestPod, container, pod};

use super::Test;
use super::host::Host;

pub const TESTS: &[Test] = &[
    ("block_devices", false, block_devices),
    ("erofs_snapshotter", false, erofs_snapshotter),
    ("erofs_without_disks", false, erofs_without_disks),
];

const LOOP_SET_FD: libc::c_ulong = 0x4c00;
const LOOP_CLR_FD: libc::c_ulong = 0x4c01;
const LOOP_CTL_GET_FREE: libc::c_ulong = 0x4c82;

fn ioctl(file: &File, request: libc::c_ulong, argument: libc::c_ulong) -> Result<libc::c_int> {
    // SAFETY: the requests of loop devices used here take a number.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), request, argument) };
    nix::errno::Errno::result(result).context("loop device")
}

/// A loop device of the host.
struct Loop {
    path: String,
    /// What it is backed by.
    file: PathBuf,
}

impl Loop {
    fn new(dir: &Path, name: &str) -> Result<Self> {
        let file = dir.join(name);
        fs::write(&file, name.repeat(512).into_bytes())?;
        File::options().write(true).open(&file)?.set_len(4 << 20)?;
        let backing = File::options().read(true).write(true).open(&file)?;
        let control = File::open("/dev/loop-control").context("/dev/loop-control")?;
        let number = ioctl(&control, LOOP_CTL_GET_FREE, 0)?;
        let path = format!("/dev/loop{number}");
        let device = File::options().read(true).write(true).open(&path);
        let device = device.with_context(|| path.clone())?;
        ioctl(&device, LOOP_SET_FD, backing.as_raw_fd().try_into()?)?;
        Ok(Self { path, file })
    }

    /// Whether the host could mount it.
    fn is_free(&self) -> bool {
        let mut options = File::options();
        options.read(true).custom_flags(libc::O_EXCL);
        options.open(&self.path).is_ok()
    }

    fn device(&self, inside: &str, permissions: &str) -> Device {
        Device {
            container_path: inside.into(),
            host_path: self.path.clone(),
            permissions: permissions.into(),
        }
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        if let Ok(device) = File::open(&self.path) {
            let _ = ioctl(&device, LOOP_CLR_FD, 0);
        }
    }
}

fn with_devices(name: &str, devices: Vec<Device>) -> ContainerConfig {
    ContainerConfig {
        devices,
        ..container(name, "busybox", &["sleep", "100000"])
    }
}

/// Devices of the host come into the running guest, by the names and with the rights that are asked
/// for, and leave it with the last container that has them.
fn block_devices(node: &mut Node, handler: &str) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let device = |name: &str| Loop::new(dir.path(), name);
    let (a, b, c) = (device("a")?, device("b")?, device("c")?);
    let (d, e) = (device("d")?, device("e")?);
    let pod = TestPod::run(node, handler, pod("disks"))?;

    let mut spec = with_devices("writer", vec![a.device("/dev/xvda", "rwm")]);
    spec.mounts = vec![Mount {
        container_path: "/disks/b".into(),
        host_path: b.path.clone(),
        readonly: true,
        ..Mount::default()
    }];
    let writer = pod.start(&spec)?;
    let seen = pod.sh(
        &writer,
        "test -b /dev/xvda && test -b /disks/b && head -c 4 /dev/xvda && head -c 4 /disks/b && \
         wc -c </dev/xvda",
    )?;
    ensure!(seen == "aaaabbbb4194304\n", "{seen:?}");
    pod.sh(
        &writer,
        "printf written | dd of=/dev/xvda bs=512 seek=100 conv=notrunc,fsync",
    )?;
    let mut written = [0; 7];
    File::open(&a.file)?.read_exact_at(&mut written, 51_200)?;
    ensure!(&written == b"written", "{written:?}");
    let write = |path: &str| format!("printf x | dd of={path} bs=512 conv=notrunc,fsync");
    let refused = |c: &str, path: &str| -> Result<()> {
        let answer = pod.cri.exec(c, &["sh", "-c", &write(path)])?;
        ensure!(answer.exit_code != 0, "{path} was written to");
        Ok(())
    };
    refused(&writer, "/disks/b")?;
    ensure!(fs::read(&b.file)?.starts_with(b"bb"));

    // Shared, also with one that may only read.
    let same = pod.start(&with_devices("same", vec![a.device("/dev/disk", "rwm")]))?;
    pod.sh(&same, &write("/dev/disk"))?;
    let reader = pod.start(&with_devices("reader", vec![a.device("/dev/xvda", "r")]))?;
    let seen = pod.sh(&reader, "head -c 2 /dev/xvda")?;
    ensure!(seen == "xa", "{seen:?}");
    refused(&reader, "/dev/xvda")?;
    // Others have nothing of it, whatever they are called inside.
    let other = pod.sleeper("other")?;
    let all = "ls /dev; mknod /x b 254 16; mknod /y b 254 32; cat /x /y | head -c 4";
    let seen = pod.cri.exec(&other, &["sh", "-c", all])?;
    let seen = String::from_utf8_lossy(&seen.stdout).into_owned();
    ensure!(!seen.contains("xvda") && !seen.contains("xa"), "{seen}");

    // Two slots are taken, two are left.
    let both = vec![c.device("/dev/xvdc", "rwm"), d.device("/data/d", "rm")];
    let last = pod.start(&with_devices("last", both))?;
    ensure!(pod.sh(&last, "head -c 4 /dev/xvdc && head -c 4 /data/d")? == "ccccdddd");
    refused(&last, "/data/d")?;
    let start = |devices: Vec<Device>| -> Result<String> {
        let c = pod
            .cri
            .create(&pod.id, &pod.config, &with_devices("more", devices))?;
        let started = pod.cri.start(&c);
        pod.cri.remove(&c)?;
        Ok(format!("{:#}", started.err().context("it was started")?))
    };
    let error = start(vec![e.device("/dev/xvdd", "rwm")])?;
    ensure!(
        error.contains("disk slots") && error.contains("/dev/xvdd"),
        "{error}"
    );
    let remove = |c: &str| -> Result<()> {
        pod.cri.stop(c, 0)?;
        pod.cri.remove(c)
    };
    remove(&last)?;
    let again = pod.start(&with_devices("again", vec![e.device("/dev/xvdd", "rwm")]))?;
    ensure!(pod.sh(&again, "head -c 4 /dev/xvdd")? == "eeee");

    // What the host uses, or another pod, is not given away to be written.
    remove(&again)?;
    let mut options = File::options();
    let claim = options
        .read(true)
        .custom_flags(libc::O_EXCL)
        .open(&c.path)?;
    let error = start(vec![c.device("/dev/xvdc", "rwm")])?;
    ensure!(error.contains("in use"), "{error}");
    drop(claim);
    ensure!(!a.is_free(), "the host could mount what a guest writes to");
    remove(&writer)?;
    ensure!(!a.is_free(), "it went before its last user");
    remove(&same)?;
    remove(&reader)?;
    ensure!(a.is_free() && c.is_free(), "it is still in use");
    let error = start(vec![Device {
        host_path: "/dev/kvm".into(),
        container_path: "/dev/kvm".into(),
        permissions: "rwm".into(),
    }])?;
    ensure!(
        error.contains("/dev/kvm") && error.contains("block devices"),
        "{error}"
    );
    pod.remove()
}

/// Reads of a device of a VM so far, by its serial numbers of slots.
fn disk_reads(pod: &str) -> Result<u64> {
    let stats = Command::new(bulkhead_tests::env::built("vmmctl")?)
        .args(["stats", "--json", pod])
        .output()?;
    ensure!(stats.status.success(), "vmmctl stats: {stats:?}");
    let stats: serde_json::Value = serde_json::from_slice(&stats.stdout)?;
    let devices = stats["devices"].as_object().context("no devices")?;
    // The first disk is the guest's own image.
    let disks = devices.iter().filter(|(name, _)| name.starts_with("blk"));
    let reads = disks.skip(1).filter_map(|(_, d)| d["reads"].as_u64());
    Ok(reads.sum())
}

/// Files that the sandboxer has open whose names end so, each once for each time.
fn open_files(node: &Node, end: &str) -> Result<Vec<PathBuf>> {
    let fds = fs::read_dir(format!("/proc/{}/fd", node.sandboxer_pid()))?;
    let links = fds.flatten().filter_map(|fd| fs::read_link(fd.path()).ok());
    let mut files: Vec<PathBuf> = links
        .filter(|path| path.to_string_lossy().ends_with(end))
        .collect();
    files.sort();
    Ok(files)
}

/// Layers are disks of the guest, one and the same file for all pods; what a container writes, and
/// takes away, is its own and lies on the host.
fn erofs_snapshotter(node: &mut Node, _: &str) -> Result<()> {
    // The first makes what stays: layers that are unpacked, and mounted by containerd.
    TestPod::run(node, EROFS, pod("erofs0")).and_then(|pod| {
        pod.sleeper("c")?;
        pod.remove()
    })?;
    let before = Host::settled(node)?;
    let one = TestPod::run(node, EROFS, pod("erofs1"))?;
    let two = TestPod::run(node, EROFS, pod("erofs2"))?;
    let (a, b) = (one.sleeper("a")?, one.sleeper("b")?);
    let c = two.sleeper("c")?;
    let root = one.sh(&a, "grep ' / ' /proc/mounts; ls /bin | wc -l")?;
    ensure!(root.starts_with("overlay / overlay"), "{root}");
    ensure!(root.contains("/run/bulkhead/layers/"), "{root}");
    ensure!(disk_reads(&one.id)? > 0, "nothing was read by the disk");
    // Two containers of a pod share the disk; two pods share the files.
    let layers = open_files(node, "/layer.erofs")?;
    println!("  open layers: {layers:?}");
    ensure!(
        layers.len().is_multiple_of(2) && layers.chunks(2).all(|pair| pair[0] == pair[1]),
        "{layers:?}"
    );
    let changes = "echo new > /new && rm /bin/ls && mkdir /bin/ls && echo more >> /etc/passwd && \
                   mv /etc/passwd /etc/passwd2 && ln -s /new /link && mknod /fifo p && \
                   chmod 700 /bin && dd if=/dev/zero of=/big bs=1M count=8 && sync";
    one.sh(&a, changes)?;
    let seen = one.sh(
        &a,
        "cat /new /link; test -d /bin/ls && test -p /fifo && test ! -e /etc/passwd && \
         tail -n 1 /etc/passwd2",
    )?;
    ensure!(seen == "new\nnew\nmore\n", "{seen:?}");
    for (pod, other) in [(&one, &b), (&two, &c)] {
        let seen = pod.sh(
            other,
            "test ! -e /new && test -x /bin/ls && grep -c more /etc/passwd || true",
        )?;
        ensure!(seen == "0\n", "{seen:?}");
    }
    // It lies where containerd counts it.
    let snapshots =
        fs::read_dir("/var/lib/containerd/io.containerd.snapshotter.v1.erofs/snapshots")?;
    let written: Vec<PathBuf> = snapshots
        .flatten()
        .map(|s| s.path().join("fs/new"))
        .filter(|file| fs::read(file).is_ok_and(|text| text == b"new\n"))
        .collect();
    ensure!(written.len() == 1, "{written:?}");
    one.cri.stop(&a, 0)?;
    one.cri.remove(&a)?;
    // The disk stays for the other, and comes again.
    ensure!(one.sh(&b, "ls /bin | wc -l")?.trim() != "0");
    let again = one.sleeper("again")?;
    ensure!(
        one.sh(&again, "test ! -e /new && cat /etc/passwd")?
            .contains("root")
    );
    one.remove()?;
    two.remove()?;
    ensure!(
        open_files(node, "/layer.erofs")?.is_empty(),
        "a layer is still open"
    );
    println!("  before {:?}", before.counts);
    let after = before.as_before(node)?;
    println!("  after  {:?}", after.counts);
    Ok(())
}

/// Guests that take no disks have the same images by virtio-fs.
fn erofs_without_disks(node: &mut Node, _: &str) -> Result<()> {
    let pod = TestPod::run(node, APP_EROFS, pod("erofsapp"))?;
    let c = pod.sleeper("c")?;
    let seen = pod.sh(
        &c,
        "uname -r; echo new > /bin/new && rm /bin/ls && cat /bin/new",
    )?;
    ensure!(seen.contains(APP) && seen.ends_with("new\n"), "{seen:?}");
    pod.remove()
}
