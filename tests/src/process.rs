//! Looking at a running process from outside: memory, threads, KVM's counters, output.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// Kills and reaps a child when the test or benchmark leaves, whatever the way.
#[derive(Debug)]
pub struct Guard(pub Child);

impl Drop for Guard {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Reads `output` until `marker` appears; returns when it did and everything read so far.
///
/// # Errors
/// When the output ends, or `timeout` passes, without the marker; the error shows the output.
pub fn wait_for_marker(
    output: &mut ChildStdout,
    marker: &[u8],
    timeout: Duration,
) -> Result<(Instant, Vec<u8>)> {
    use std::os::fd::AsFd;
    let start = Instant::now();
    let mut seen = Vec::new();
    let mut chunk = [0; 4096];
    loop {
        let left = timeout.saturating_sub(start.elapsed());
        let mut fds = [PollFd::new(output.as_fd(), PollFlags::POLLIN)];
        let millis = u16::try_from(left.as_millis()).unwrap_or(u16::MAX);
        poll(&mut fds, PollTimeout::from(millis)).context("poll")?;
        if fds[0].any() == Some(true) {
            let n = match output.read(&mut chunk) {
                Ok(n) => n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => return Err(e.into()),
            };
            let now = Instant::now();
            seen.extend_from_slice(&chunk[..n]);
            if seen.windows(marker.len()).any(|w| w == marker) {
                return Ok((now, seen));
            }
            if n == 0 {
                bail!(
                    "the output ended without {:?}: {}",
                    String::from_utf8_lossy(marker),
                    String::from_utf8_lossy(&seen)
                );
            }
        }
        if start.elapsed() >= timeout {
            bail!(
                "no {:?} within {timeout:?}: {}",
                String::from_utf8_lossy(marker),
                String::from_utf8_lossy(&seen)
            );
        }
    }
}

/// Memory of a process in KiB, without what belongs to its guests.
#[derive(Clone, Copy, Debug, Default)]
pub struct Memory {
    /// Proportional set size without guest memory.
    pub pss: u64,
    /// Anonymous part of that.
    pub anonymous: u64,
    /// Guest memory that is resident.
    pub guest: u64,
}

/// One mapping of `/proc/PID/smaps`, in KiB.
#[derive(Debug, Default)]
struct Mapping {
    /// Device and inode, where a file is behind it.
    file: Option<(String, String)>,
    size: u64,
    pss: u64,
    anonymous: u64,
}

/// Reads `/proc/PID/smaps`. Guest memory is what maps a file with at least `guest_bytes` in all
/// (a VM's memory may be several mappings of one file), or one anonymous mapping of that size.
///
/// # Errors
/// When the process is gone.
pub fn memory(pid: u32, guest_bytes: u64) -> Result<Memory> {
    Ok(sum(&mappings(pid)?, guest_bytes, true))
}

/// The same of our own programs, whose guests' memory is always a file: a large anonymous mapping
/// is not a guest's, and is counted.
///
/// # Errors
/// When the process is gone.
pub fn memory_beside_files(pid: u32, guest_bytes: u64) -> Result<Memory> {
    Ok(sum(&mappings(pid)?, guest_bytes, false))
}

fn mappings(pid: u32) -> Result<Vec<Mapping>> {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps"))?;
    let mut mappings: Vec<Mapping> = Vec::new();
    for line in text.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        let Some((first, rest)) = words.split_first() else {
            continue;
        };
        if let Some((from, to)) = first.split_once('-')
            && let (Ok(from), Ok(to)) = (u64::from_str_radix(from, 16), u64::from_str_radix(to, 16))
        {
            let file = match rest {
                [_, _, device, inode, ..] if *inode != "0" => {
                    Some(((*device).to_owned(), (*inode).to_owned()))
                }
                _ => None,
            };
            mappings.push(Mapping {
                file,
                size: (to - from) >> 10,
                ..Mapping::default()
            });
            continue;
        }
        let value: u64 = rest.first().and_then(|v| v.parse().ok()).unwrap_or(0);
        if let Some(mapping) = mappings.last_mut() {
            match *first {
                "Pss:" => mapping.pss = value,
                "Anonymous:" => mapping.anonymous = value,
                _ => {}
            }
        }
    }
    Ok(mappings)
}

fn sum(mappings: &[Mapping], guest_bytes: u64, anonymous_guests: bool) -> Memory {
    let mut of_file: BTreeMap<&(String, String), u64> = BTreeMap::new();
    for mapping in mappings {
        if let Some(file) = &mapping.file {
            *of_file.entry(file).or_insert(0) += mapping.size;
        }
    }
    let mut sum = Memory::default();
    for mapping in mappings {
        let whole = match &mapping.file {
            Some(file) => of_file[file],
            None if anonymous_guests => mapping.size,
            None => 0,
        };
        if whole >= guest_bytes >> 10 {
            sum.guest += mapping.pss;
        } else {
            sum.pss += mapping.pss;
            sum.anonymous += mapping.anonymous;
        }
    }
    sum
}

/// Number of threads of a process, without those the host kernel adds to it: KVM runs one worker
/// per VM (`kvm-nx-lpage-recovery`) as a thread of the process that made the VM, whoever that is.
///
/// # Errors
/// When the process is gone.
pub fn threads(pid: u32) -> Result<usize> {
    let mut count = 0;
    for task in fs::read_dir(format!("/proc/{pid}/task"))? {
        // A thread may end while we look.
        if let Ok(stat) = fs::read_to_string(task?.path().join("stat"))
            && is_live_thread(&stat)
        {
            count += 1;
        }
    }
    Ok(count)
}

/// Whether a line of `/proc/PID/task/TID/stat` is of a thread of the program that runs. One that
/// has been joined may still be listed for a moment, on its way out (PF_EXITING of linux/sched.h,
/// field 9).
fn is_live_thread(stat: &str) -> bool {
    const PF_EXITING: u64 = 4;
    let Some((name, rest)) = stat.rsplit_once(')') else {
        return false;
    };
    let flags = rest.split_whitespace().nth(6).and_then(|f| f.parse().ok());
    !name.contains("(kvm-nx-lpage") && flags.is_some_and(|f: u64| f & PF_EXITING == 0)
}

/// Open descriptors of a process.
///
/// # Errors
/// When the process is gone.
pub fn descriptors(pid: u32) -> Result<usize> {
    Ok(fs::read_dir(format!("/proc/{pid}/fd"))?.count())
}

/// KVM's counters in debugfs, of one process: exits by name, summed over its VMs.
///
/// # Errors
/// When debugfs is not mounted or the process has no VM.
pub fn kvm_counters(pid: u32) -> Result<BTreeMap<String, u64>> {
    let mut sums = BTreeMap::new();
    for vm in kvm_directories(pid)? {
        let mut stack = vec![vm];
        while let Some(dir) = stack.pop() {
            for entry in fs::read_dir(&dir)? {
                let entry = entry?;
                let path = entry.path();
                if path.is_dir() {
                    continue;
                }
                if let Some(value) = fs::read_to_string(&path)
                    .ok()
                    .and_then(|text| text.trim().parse::<u64>().ok())
                {
                    let name = entry.file_name().to_string_lossy().into_owned();
                    *sums.entry(name).or_insert(0) += value;
                }
            }
        }
    }
    if sums.is_empty() {
        bail!("process {pid} has no VM in /sys/kernel/debug/kvm");
    }
    Ok(sums)
}

/// One counter, read with as little delay as possible.
///
/// # Errors
/// As [`kvm_counters`].
pub fn kvm_counter(directories: &[PathBuf], name: &str) -> Result<u64> {
    let mut sum = 0;
    for dir in directories {
        let path = dir.join(name);
        let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        sum += text.trim().parse::<u64>().context("counter")?;
    }
    Ok(sum)
}

/// Directories of a process' VMs in debugfs. Each is called `TASK-DESCRIPTOR`, and the task is the
/// thread that has made the VM: not the process' first one, and it may be gone.
///
/// # Errors
/// When debugfs is not mounted.
pub fn kvm_directories(pid: u32) -> Result<Vec<PathBuf>> {
    let root = Path::new("/sys/kernel/debug/kvm");
    let mut all = Vec::new();
    for entry in fs::read_dir(root).context("/sys/kernel/debug/kvm (mount debugfs)")? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        // Beside the VMs there are KVM's own counters.
        let Some((task, descriptor)) = name.split_once('-') else {
            continue;
        };
        let (Ok(task), Ok(descriptor)) = (task.parse::<u32>(), descriptor.parse::<u32>()) else {
            continue;
        };
        let is_vm = fs::read_link(format!("/proc/{pid}/fd/{descriptor}"))
            .is_ok_and(|file| file == Path::new("anon_inode:kvm-vm"));
        // Another process may have a VM by the same number.
        if is_vm && process_of(task).is_none_or(|process| process == pid) {
            all.push(entry.path());
        }
    }
    Ok(all)
}

/// The process that a thread belongs to.
fn process_of(task: u32) -> Option<u32> {
    let status = fs::read_to_string(format!("/proc/{task}/status")).ok()?;
    let line = status.lines().find_map(|l| l.strip_prefix("Tgid:"))?;
    line.trim().parse().ok()
}

/// Threads, descriptors, mounts and network devices of this process and host: what a leak shows
/// in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Footprint {
    /// Threads of this process.
    pub threads: usize,
    /// Descriptors of this process.
    pub descriptors: usize,
    /// Mounts this process sees.
    pub mounts: usize,
    /// Network devices.
    pub links: Vec<String>,
}

impl Footprint {
    /// Counts now.
    ///
    /// # Errors
    /// When /proc cannot be read.
    pub fn now() -> Result<Self> {
        let pid = std::process::id();
        let mut links: Vec<_> = fs::read_dir("/sys/class/net")?
            .filter_map(|e| e.ok().map(|e| e.file_name().to_string_lossy().into_owned()))
            .collect();
        links.sort();
        Ok(Self {
            threads: threads(pid)?,
            descriptors: descriptors(pid)?,
            mounts: fs::read_to_string("/proc/self/mounts")?.lines().count(),
            links,
        })
    }
}
