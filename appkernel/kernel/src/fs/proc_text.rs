//! The texts of /proc and /sys.

use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use appkernel_core::sysv;

use appkernel_core::vma::{Backing, EXECUTE, READ, WRITE};
use appkernel_hal::PAGE;
use core::arch::x86_64::__cpuid;
use core::sync::atomic::Ordering;

use super::proc::{machine, uuid};
use crate::container::visible;
use crate::fs::file::File;
use crate::task::{self, Task};

/// The kernel's version as programs see it: the interface is that of this Linux, as far as it goes.
pub const RELEASE: &str = "6.12.0-bulkhead-app";
/// What is told of the build.
pub const VERSION: &str = "#1 Bulkhead app kernel";
/// Longest text: a program with many mappings chooses how long it would be, and the kernel has to
/// have it in one piece.
const LONGEST: usize = 256 << 10;
/// Ticks of the clock that times in /proc are counted in.
const TICK_NS: u64 = 10_000_000;

/// The text of a file that is not about a process.
pub fn of_machine(at: &str) -> Option<Vec<u8>> {
    let m = machine();
    let seconds = m.up_ns / 1_000_000_000;
    let hundredths = m.up_ns / 10_000_000 % 100;
    let text = match at {
        "cmdline" => String::from("\n"),
        "cpuinfo" => cpuinfo(),
        "devices" => {
            String::from("Character devices:\n  1 mem\n  5 /dev/tty\n136 pts\n\nBlock devices:\n")
        }
        "diskstats" | "interrupts" | "partitions" => String::new(),
        "filesystems" => String::from(
            "nodev\tproc\nnodev\tsysfs\nnodev\ttmpfs\nnodev\tdevpts\nnodev\tvirtiofs\n",
        ),
        "loadavg" => format!(
            "0.00 0.00 0.00 1/{} {}\n",
            task::count(),
            visible(task::current().id)
        ),
        "meminfo" => format!(
            "MemTotal:       {:8} kB\nMemFree:        {:8} kB\nMemAvailable:   {:8} kB\n\
             Buffers:               0 kB\nCached:                0 kB\nSwapCached:            0 kB\n\
             Active:                0 kB\nInactive:              0 kB\nSwapTotal:             0 kB\n\
             SwapFree:              0 kB\nDirty:                 0 kB\nAnonPages:             0 kB\n\
             Mapped:                0 kB\nShmem:                 0 kB\nKReclaimable:          0 kB\n\
             Slab:                  0 kB\nSReclaimable:          0 kB\nSUnreclaim:            0 kB\n\
             KernelStack:           0 kB\nPageTables:            0 kB\n\
             CommitLimit:    {:8} kB\nCommitted_AS:          0 kB\nVmallocTotal:          0 kB\n\
             HugePages_Total:       0\nHugePages_Free:        0\nHugepagesize:       2048 kB\n",
            m.total_kib, m.free_kib, m.free_kib, m.total_kib
        ),
        "stat" => {
            let ticks = task::busy_ns() / TICK_NS;
            let idle = (m.up_ns / TICK_NS).saturating_sub(ticks);
            format!(
                "cpu  {ticks} 0 0 {idle} 0 0 0 0 0 0\ncpu0 {ticks} 0 0 {idle} 0 0 0 0 0 0\n\
                 ctxt 0\nbtime {}\nprocesses {}\nprocs_running 1\nprocs_blocked 0\n",
                (appkernel_hal::clock::realtime_ns().saturating_sub(m.up_ns)) / 1_000_000_000,
                task::count()
            )
        }
        "swaps" => String::from("Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n"),
        "uptime" => format!("{seconds}.{hundredths:02} {seconds}.{hundredths:02}\n"),
        "version" => format!("Linux version {RELEASE} (bulkhead) {VERSION}\n"),
        "vmstat" => format!("nr_free_pages {}\n", m.free_kib / 4),
        "sys/fs/file-max" | "sys/fs/nr_open" => String::from("1048576\n"),
        "sys/fs/file-nr" => String::from("0\t0\t1048576\n"),
        "sys/fs/pipe-max-size" => format!("{}\n", super::pipe::CAPACITY_MAX),
        "sys/kernel/cap_last_cap" => String::from("40\n"),
        "sys/kernel/hostname" => {
            let hostname = task::current().container.hostname.lock().clone();
            format!("{}\n", String::from_utf8_lossy(&hostname))
        }
        "sys/kernel/domainname" => {
            let name = task::current().container.domainname.lock().clone();
            format!("{}\n", String::from_utf8_lossy(&name))
        }
        "sys/kernel/ngroups_max" => String::from("65536\n"),
        "sys/kernel/osrelease" => format!("{RELEASE}\n"),
        "sys/kernel/ostype" => String::from("Linux\n"),
        "sys/kernel/overflowgid" | "sys/kernel/overflowuid" => String::from("65534\n"),
        "sys/kernel/pid_max" => String::from("4194304\n"),
        "sys/kernel/random/boot_id" | "sys/kernel/random/uuid" => uuid(),
        "sys/kernel/random/entropy_avail" => String::from("256\n"),
        "sys/kernel/randomize_va_space" => {
            let on = crate::exec::is_random(0);
            format!("{}\n", if on { 2 } else { 0 })
        }
        "sys/kernel/sched_autogroup_enabled" => String::from("0\n"),
        "sys/kernel/msgmax" => format!("{}\n", sysv::MESSAGE_MAX),
        "sys/kernel/msgmnb" => format!("{}\n", sysv::QUEUE_BYTES),
        "sys/kernel/msgmni" | "sys/kernel/shmmni" => format!("{}\n", sysv::MAX_OBJECTS),
        "sys/kernel/sem" => format!(
            "{}\t{}\t{}\t{}\n",
            sysv::SEMAPHORES_MAX,
            sysv::SEMAPHORES_MAX * sysv::MAX_OBJECTS,
            sysv::OPERATIONS_MAX,
            sysv::MAX_OBJECTS
        ),
        "sys/kernel/shmall" | "sys/kernel/shmmax" => format!("{}\n", u64::MAX - (1 << 24)),
        "sys/kernel/tainted" => String::from("0\n"),
        "sysvipc/msg" => crate::syscall::sysv::text("msg"),
        "sysvipc/sem" => crate::syscall::sysv::text("sem"),
        "sysvipc/shm" => crate::syscall::sysv::text("shm"),
        "sys/kernel/threads-max" => String::from("4096\n"),
        "sys/kernel/version" => format!("{VERSION}\n"),
        "sys/net/core/somaxconn" | "sys/net/ipv4/tcp_max_syn_backlog" => String::from("4096\n"),
        "sys/net/ipv4/ip_local_port_range" => String::from("32768\t60999\n"),
        "sys/vm/max_map_count" => String::from("65530\n"),
        "sys/vm/mmap_min_addr" => String::from("65536\n"),
        // Memory is given when it is touched, whatever was promised.
        "sys/vm/overcommit_memory" => String::from("1\n"),
        "sys/vm/overcommit_ratio" => String::from("50\n"),
        "sys/vm/swappiness" => String::from("0\n"),
        "devices/system/cpu/online"
        | "devices/system/cpu/possible"
        | "devices/system/cpu/present"
        | "devices/system/node/online" => String::from("0\n"),
        "devices/system/cpu/cpu0/online" => String::from("1\n"),
        "kernel/mm/transparent_hugepage/enabled" => String::from("always madvise [never]\n"),
        at => return of_cgroup(at.strip_prefix("fs/cgroup/")?),
    };
    Some(text.into_bytes())
}

/// The files of the running task's container as if it were a cgroup.
fn of_cgroup(name: &str) -> Option<Vec<u8>> {
    let container = alloc::sync::Arc::clone(&task::current().container);
    let or_max = |n: Option<u64>| n.map_or(String::from("max"), |n| format!("{n}"));
    let share = *container.share.lock();
    let files = container.charge.in_files() * PAGE;
    let text = match name {
        "cgroup.procs" => {
            let tasks = task::tasks_of(&container);
            let first = tasks.iter().filter(|t| t.id == t.process);
            first.map(|t| format!("{}\n", visible(t.id))).collect()
        }
        "cpu.max" => {
            let (quota, period) = share.limit_ns();
            let us = |ns: u64| ns / 1000;
            format!("{} {}\n", or_max(quota.map(us)), us(period))
        }
        "cpu.stat" => {
            let (us, counted) = (
                container.cpu_ns.load(Ordering::Relaxed) / 1000,
                share.statistics(),
            );
            format!(
                "usage_usec {us}\nuser_usec {us}\nsystem_usec 0\nnr_periods {}\nnr_throttled {}\n\
                 throttled_usec {}\nnr_bursts 0\nburst_usec 0\n",
                counted.periods,
                counted.throttled,
                counted.throttled_ns / 1000
            )
        }
        "cpu.weight" => format!("{}\n", (share.weight() * 100 / 1024).clamp(1, 10_000)),
        "memory.current" => format!("{}\n", task::pages_of(&container) * PAGE),
        "memory.events" => {
            let kills = container.oom_kills.load(Ordering::Relaxed);
            format!("low 0\nhigh 0\nmax 0\noom {kills}\noom_kill {kills}\noom_group_kill 0\n")
        }
        "memory.max" => {
            let most = container.charge.most();
            format!("{}\n", or_max(most.map(|pages| pages.saturating_mul(PAGE))))
        }
        "memory.stat" => {
            let all = task::pages_of(&container) * PAGE;
            format!(
                "anon {}\nfile {files}\nkernel 0\nshmem {files}\ninactive_anon 0\nactive_anon {}\n\
                 inactive_file 0\nactive_file 0\nunevictable 0\n",
                all.saturating_sub(files),
                all.saturating_sub(files)
            )
        }
        "pids.current" => format!("{}\n", task::tasks_of(&container).len()),
        "pids.max" => {
            let most = container.pids_max.load(Ordering::Relaxed);
            format!("{}\n", or_max((most != u64::MAX).then_some(most)))
        }
        _ => return None,
    };
    Some(text.into_bytes())
}

/// What /proc says of an open file.
pub fn of_file(file: &File) -> String {
    let ino = file.node().map_or(0, |node| node.identity().1);
    format!(
        "pos:\t{}\nflags:\t0{:o}\nmnt_id:\t20\nino:\t{ino}\n",
        *file.offset.lock(),
        file.flags()
    )
}

fn cpuinfo() -> String {
    let mut vendor = Vec::new();
    let leaf = __cpuid(0);
    for word in [leaf.ebx, leaf.edx, leaf.ecx] {
        vendor.extend(word.to_le_bytes());
    }
    let leaf1 = __cpuid(1);
    let mut flags = String::new();
    for (bit, name) in [
        (0, "fpu"),
        (4, "tsc"),
        (5, "msr"),
        (6, "pae"),
        (8, "cx8"),
        (15, "cmov"),
        (19, "clflush"),
        (23, "mmx"),
        (24, "fxsr"),
        (25, "sse"),
        (26, "sse2"),
    ] {
        if leaf1.edx >> bit & 1 != 0 {
            flags += name;
            flags.push(' ');
        }
    }
    for (bit, name) in [
        (0, "pni"),
        (1, "pclmulqdq"),
        (9, "ssse3"),
        (12, "fma"),
        (13, "cx16"),
        (19, "sse4_1"),
        (20, "sse4_2"),
        (22, "movbe"),
        (23, "popcnt"),
        (25, "aes"),
        (26, "xsave"),
        (28, "avx"),
        (30, "rdrand"),
    ] {
        if leaf1.ecx >> bit & 1 != 0 {
            flags += name;
            flags.push(' ');
        }
    }
    format!(
        "processor\t: 0\nvendor_id\t: {}\ncpu family\t: {}\nmodel\t\t: {}\nmodel name\t: virtual CPU\n\
         stepping\t: {}\ncpu MHz\t\t: 1000.000\nphysical id\t: 0\nsiblings\t: 1\ncore id\t\t: 0\n\
         cpu cores\t: 1\nfpu\t\t: yes\nflags\t\t: {}\nbogomips\t: 2000.00\naddress sizes\t: 48 bits virtual\n\n",
        String::from_utf8_lossy(&vendor),
        leaf1.eax >> 8 & 15,
        leaf1.eax >> 4 & 15,
        leaf1.eax & 15,
        flags.trim_end()
    )
}

/// The text of a file about a process, or a thread of it.
pub fn of_task(name: &str, task: &Task, thread: bool) -> Option<Vec<u8>> {
    if let Some(name) = name.strip_prefix("net/") {
        return crate::net::text::proc(name).map(String::into_bytes);
    }
    let text = match name {
        "auxv" => {
            let mm = task.memory()?;
            let mut mm = mm.lock();
            let (start, len) = mm.auxiliary;
            let mut bytes = alloc::vec![0; len.min(PAGE) as usize];
            let read = mm.read(start, &mut bytes);
            bytes.truncate(read);
            return Some(bytes);
        }
        "cgroup" => String::from("0::/\n"),
        "children" => {
            let mut text = String::new();
            for child in task::tasks_of(&task.container) {
                if child.id == child.process && child.links.lock().parent == task.process {
                    text += &format!("{} ", visible(child.id));
                }
            }
            text
        }
        "coredump_filter" => String::from("00000033\n"),
        "cpuset" => String::from("/\n"),
        "gid_map" | "uid_map" => format!("{:>10} {:>10} {:>10}\n", 0, 0, u32::MAX),
        "personality" => format!("{:08x}\n", task.asked.lock().persona),
        "schedstat" => format!("{} 0 0\n", task.cpu_ns.load(Ordering::Relaxed)),
        "sessionid" => String::from("4294967295"),
        "setgroups" => String::from("allow\n"),
        "smaps_rollup" => {
            let (_, resident) = memory(task);
            format!(
                "00000000-7fffffffffff ---p 00000000 00:00 0                          [rollup]\n\
                 Rss:            {0:8} kB\nPss:            {0:8} kB\nSwap:                  0 kB\n",
                resident * 4
            )
        }
        "timerslack_ns" => format!("{}\n", task.asked.lock().timer_slack_ns),
        "wchan" => String::from("0"),
        "cmdline" | "environ" => {
            let mm = task.memory()?;
            let mut mm = mm.lock();
            let (start, len) = if name == "cmdline" {
                mm.arguments
            } else {
                mm.environment
            };
            let mut bytes = alloc::vec![0; len.min(LONGEST as u64) as usize];
            let read = mm.read(start, &mut bytes);
            bytes.truncate(read);
            return Some(bytes);
        }
        "comm" => {
            let mut name = task.name.lock().clone();
            name.push(b'\n');
            return Some(name);
        }
        "io" => String::from(
            "rchar: 0\nwchar: 0\nsyscr: 0\nsyscw: 0\nread_bytes: 0\nwrite_bytes: 0\ncancelled_write_bytes: 0\n",
        ),
        "limits" => limits(task),
        "loginuid" => String::from("4294967295"),
        "maps" | "smaps" => return Some(maps(task)),
        "mounts" => mounts(task, |_, at, (source, kind, options)| {
            format!("{source} {at} {kind} {options} 0 0\n")
        }),
        "mountinfo" => mounts(task, |i, at, (source, kind, options)| {
            format!(
                "{} 1 0:{} / {at} {options} - {kind} {source} {options}\n",
                20 + i,
                20 + i
            )
        }),
        "oom_score_adj" => format!("{}\n", task.place.lock().oom_score_adj),
        "oom_adj" | "oom_score" => String::from("0\n"),
        "stat" => stat(task, thread),
        "statm" => {
            let (size, resident) = memory(task);
            format!("{} {resident} 0 0 0 {} 0\n", size / PAGE, size / PAGE)
        }
        "status" => status(task),
        _ => return None,
    };
    Some(text.into_bytes())
}

/// Bytes mapped, pages there.
fn memory(task: &Task) -> (u64, u64) {
    let Some(mm) = task.memory() else {
        return (0, 0);
    };
    let mut mm = mm.lock();
    let size = mm.areas.iter().map(|a| a.end - a.start).sum();
    (size, mm.resident() as u64)
}

fn mounts(task: &Task, line: impl Fn(usize, &str, (&str, &str, &str)) -> String) -> String {
    let mut text = String::new();
    for (i, mount) in task.container.mounts().iter().enumerate() {
        let (source, kind, options) = &mount.shown;
        let options = format!("{},{options}", if mount.read_only { "ro" } else { "rw" });
        text += &line(
            i,
            &String::from_utf8_lossy(&mount.at),
            (source, kind, &options),
        );
    }
    text
}

fn limits(task: &Task) -> String {
    let mut text = format!(
        "{:<26}{:<21}{:<21}{:<10}\n",
        "Limit", "Soft Limit", "Hard Limit", "Units"
    );
    let limits = *task.limits.lock();
    for (resource, (name, unit)) in [
        ("Max cpu time", "seconds"),
        ("Max file size", "bytes"),
        ("Max data size", "bytes"),
        ("Max stack size", "bytes"),
        ("Max core file size", "bytes"),
        ("Max resident set", "bytes"),
        ("Max processes", "processes"),
        ("Max open files", "files"),
        ("Max locked memory", "bytes"),
        ("Max address space", "bytes"),
        ("Max file locks", "locks"),
        ("Max pending signals", "signals"),
        ("Max msgqueue size", "bytes"),
        ("Max nice priority", ""),
        ("Max realtime priority", ""),
        ("Max realtime timeout", "us"),
    ]
    .into_iter()
    .enumerate()
    {
        let [soft, hard] = limits.get(resource).unwrap_or([u64::MAX; 2]);
        let shown = |n: u64| match n {
            u64::MAX => String::from("unlimited"),
            n => format!("{n}"),
        };
        text += &format!(
            "{name:<26}{:<21}{:<21}{unit:<10}\n",
            shown(soft),
            shown(hard)
        );
    }
    text
}

fn maps(task: &Task) -> Vec<u8> {
    let Some(mm) = task.memory() else {
        return Vec::new();
    };
    let mm = mm.lock();
    let mut text = Vec::new();
    for area in mm.areas.iter() {
        if text.len() >= LONGEST {
            break;
        }
        let bit = |bit, letter| {
            if area.protection & bit != 0 {
                letter
            } else {
                '-'
            }
        };
        let (offset, device, inode, path) = match &area.backing {
            Backing::Zero => {
                let path: &[u8] =
                    if area.start >= mm.brk_start && area.end <= mm.brk.next_multiple_of(PAGE) {
                        b"[heap]"
                    } else if area.end == mm.stack_top {
                        b"[stack]"
                    } else {
                        b""
                    };
                (0, 0, 0, path)
            }
            Backing::File(file, offset) => {
                let path = file.path.as_slice();
                // What is no file of a file system has no place there.
                let (device, inode) = if path.starts_with(b"[") {
                    (0, 0)
                } else {
                    file.node.identity()
                };
                let offset = if path.starts_with(b"[") { &0 } else { offset };
                (*offset, device, inode, path)
            }
        };
        let line = format!(
            "{:08x}-{:08x} {}{}{}{} {offset:08x} 00:{:02x} {inode} ",
            area.start,
            area.end,
            bit(READ, 'r'),
            bit(WRITE, 'w'),
            bit(EXECUTE, 'x'),
            if area.shared { 's' } else { 'p' },
            device & 0xff,
        );
        text.extend(line.bytes());
        if !path.is_empty() {
            text.resize(text.len() + 73usize.saturating_sub(line.len()), b' ');
            text.extend(path);
        }
        text.push(b'\n');
    }
    text
}

fn stat(task: &Task, thread: bool) -> String {
    let (size, resident) = memory(task);
    let (parent, group, session) = {
        let links = task.links.lock();
        (links.parent, links.group, links.session)
    };
    let cpu = if thread {
        task.cpu_ns.load(Ordering::Relaxed)
    } else {
        task::process_cpu_ns(task.process)
    } / TICK_NS;
    let tty = task::terminal_number(session);
    format!(
        "{} ({}) {} {} {} {} {tty} -1 4194304 0 0 0 0 {cpu} 0 0 0 20 0 {} 0 {} {size} {resident} \
         18446744073709551615 0 0 0 0 0 0 0 0 0 0 0 0 17 0 0 0 0 0 0 0 0 0 0 0 0 0 0\n",
        visible(task.id),
        String::from_utf8_lossy(&task.name.lock()),
        task::state_letter(task.id),
        visible(parent),
        visible(group),
        visible(session),
        task::threads(task.process),
        task.started_ns / TICK_NS,
    )
}

fn status(task: &Task) -> String {
    let (size, resident) = memory(task);
    let locked = task
        .memory()
        .map_or(0, |mm| mm.lock().locked_bytes(0, appkernel_hal::USER_END));
    let letter = task::state_letter(task.id);
    let state = match letter {
        'R' => "running",
        'Z' => "zombie",
        'T' => "stopped",
        _ => "sleeping",
    };
    let parent = task.links.lock().parent;
    let (pending, mask) = {
        let pending = task.pending.lock();
        (pending.waiting(), pending.mask)
    };
    let (ignored, caught) = task.handlers().lock().sets();
    let c = task.credentials.lock().clone();
    let groups: Vec<String> = c.groups.iter().map(|g| format!("{g}")).collect();
    let set = c.capabilities;
    let no_new = u8::from(task.asked.lock().no_new_privileges);
    format!(
        "Name:\t{}\nUmask:\t{:04o}\nState:\t{letter} ({state})\nTgid:\t{}\nNgid:\t0\nPid:\t{}\nPPid:\t{}\n\
         TracerPid:\t0\nUid:\t{}\t{}\t{}\t{}\nGid:\t{}\t{}\t{}\t{}\nFDSize:\t64\nGroups:\t{} \n\
         VmPeak:\t{:8} kB\nVmSize:\t{:8} kB\nVmLck:\t{:8} kB\nVmHWM:\t{:8} kB\nVmRSS:\t{:8} kB\nVmData:\t{:8} kB\n\
         VmSwap:\t       0 kB\nThreads:\t{}\nSigPnd:\t{pending:016x}\nShdPnd:\t0000000000000000\n\
         SigBlk:\t{mask:016x}\nSigIgn:\t{ignored:016x}\nSigCgt:\t{caught:016x}\n\
         CapInh:\t{:016x}\nCapPrm:\t{:016x}\nCapEff:\t{:016x}\n\
         CapBnd:\t{:016x}\nCapAmb:\t0000000000000000\nNoNewPrivs:\t{no_new}\nSeccomp:\t0\n\
         Cpus_allowed:\t1\nCpus_allowed_list:\t0\nMems_allowed:\t1\nMems_allowed_list:\t0\n\
         voluntary_ctxt_switches:\t0\nnonvoluntary_ctxt_switches:\t0\n",
        String::from_utf8_lossy(&task.name.lock()),
        task.place.lock().umask,
        visible(task.process),
        visible(task.id),
        visible(parent),
        c.uid,
        c.euid,
        c.suid,
        c.fsuid,
        c.gid,
        c.egid,
        c.sgid,
        c.fsgid,
        groups.join(" "),
        size / 1024,
        size / 1024,
        locked / 1024,
        resident * 4,
        resident * 4,
        size / 1024,
        task::threads(task.process),
        set.inheritable,
        set.permitted,
        set.effective,
        set.bounding,
    )
}
