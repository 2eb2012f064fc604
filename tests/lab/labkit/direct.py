# SPDX-License-Identifier: Apache-2.0
"""With hardware KVM: the command runs on this machine, in namespaces that go away with it.

It sees the same Debian root as in the emulated host (containerd, runc, CNI plugins, QEMU), not the
machine's own, so what a test finds does not depend on the distribution it runs on. A child becomes
PID 1 of new namespaces, builds that root below an overlay that forgets every change, and starts
the command. When the child ends, the kernel kills every process that is left; when the driver
dies, the kernel kills the child. The cgroup of it all is removed by the driver, or by the next.
"""

import contextlib
import ctypes
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

from .common import (
    EXIT_LAB_FAILED, LIBC, LabError, TimedOut, cache_dir, die_with, say)
from .parts import Parts

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x00020000, 0x04000000, 0x08000000
CLONE_NEWPID, CLONE_NEWNET, CLONE_NEWCGROUP = 0x20000000, 0x40000000, 0x02000000
MS_BIND, MS_REC = 0x1000, 0x4000
MS_PRIVATE, MS_SHARED = 1 << 18, 1 << 20
MNT_DETACH = 2
SYS_PIVOT_ROOT = 155  # x86-64

CGROUPS = Path("/sys/fs/cgroup")
CGROUP_PREFIX = "bulkhead-lab-"
# What the kernel does not load by itself when it is first used.
MODULES = ["overlay", "tun", "vhost_net", "vhost_vsock", "br_netfilter", "erofs"]
# Of the machine's devices the command sees only these, where they exist.
DEVICES = "null zero full random urandom tty kvm fuse net/tun vhost-net vhost-vsock".split()
# File systems of the new root: source, place, type, options. In sysfs the places exist, or the
# kernel lacks that file system.
MOUNTS = [
    ("proc", "/proc", "proc", ""),
    ("sysfs", "/sys", "sysfs", ""),
    ("tmpfs", "/dev", "tmpfs", "mode=0755"),
    ("tmpfs", "/dev/shm", "tmpfs", "mode=1777"),
    ("devpts", "/dev/pts", "devpts", "gid=5,mode=620,ptmxmode=666"),
    ("mqueue", "/dev/mqueue", "mqueue", ""),
    ("hugetlbfs", "/dev/hugepages", "hugetlbfs", ""),
    ("cgroup2", "/sys/fs/cgroup", "cgroup2", ""),
    ("debugfs", "/sys/kernel/debug", "debugfs", ""),
    ("tracefs", "/sys/kernel/tracing", "tracefs", ""),
    ("bpf", "/sys/fs/bpf", "bpf", "mode=700"),
    ("tmpfs", "/run", "tmpfs", "mode=0755"),
    ("tmpfs", "/tmp", "tmpfs", "mode=1777"),
    ("tmpfs", "/var/tmp", "tmpfs", "mode=1777"),
    ("tmpfs", "/var/lib/containerd", "tmpfs", "mode=0755"),
    ("tmpfs", "/var/lib/bulkhead", "tmpfs", "mode=0755"),
]


def as_root() -> None:
    """Namespaces with devices, cgroups and a network are root's: starts this program again by sudo."""
    if os.geteuid() == 0:
        return
    if not shutil.which("sudo"):
        raise LabError("running on this machine's KVM needs root, and there is no sudo")
    keep = [f"{k}={v}" for k, v in os.environ.items()
            if k in ("HOME", "PATH", "TERM", "CI", "NO_COLOR")
            or k.startswith(("BULKHEAD_", "RUST_", "CARGO_", "BENCH_"))]
    keep.append(f"BULKHEAD_CACHE={cache_dir()}")
    os.execvp("sudo", ["sudo", "env", *keep, sys.executable, *sys.argv])


def run(args: list[str], env: dict[str, str], cwd: str, timeout: float | None,
        visible: list[Path], again: bool) -> int:
    """Runs the command; returns its exit code, 128+n for signal n."""
    as_root()
    parts = Parts()
    parts.prepare(again, [parts.root])
    subprocess.run(["modprobe", "-qa", *MODULES], check=False, stderr=subprocess.DEVNULL)
    for d in visible:
        d.mkdir(parents=True, exist_ok=True)
    # The driver keeps its own network, mounts and names; only the child leaves them.
    driver, cgroup = os.getpid(), make_cgroup()
    try:
        child = os.fork()
        if child == 0:
            enter(driver, cgroup, parts.root.dir / "tree", visible, args, env, cwd)
        return wait_for(child, timeout)
    finally:
        # Not in a child, which ends by _exit.
        if cgroup:
            remove_cgroup(cgroup)


def enter(driver: int, cgroup: Path | None, tree: Path, visible: list[Path], args: list[str],
          env: dict[str, str], cwd: str) -> None:
    """In the child: new namespaces, whose first process sets up the root and runs the command."""
    code = EXIT_LAB_FAILED
    try:
        die_with(driver)
        if cgroup:
            join(cgroup)
        flags = (CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWPID | CLONE_NEWNET
                 | CLONE_NEWCGROUP)
        check(LIBC.unshare(flags), "new namespaces")
        if cgroup:
            join(cgroup / "init")
            enable_controllers(cgroup)
        first = os.fork()
        if first == 0:
            try:
                die_with(0)  # in the new PID namespace getppid() is 0
                set_up(tree, visible)
                code = supervise(args, env, cwd)
            except (OSError, subprocess.SubprocessError) as e:
                say(f"error: cannot set up this machine for the command: {e}")
            finally:
                os._exit(code)
        code = wait_for(first, None)
    except OSError as e:
        say(f"error: {e}")
    finally:
        sys.stdout.flush()
        os._exit(code)


def wait_for(child: int, timeout: float | None) -> int:
    """Passes our signals on to the child and waits for its end."""
    def forward(signum: int, _: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signum)

    def expired(_signum: int, _frame: object) -> None:
        os.kill(child, signal.SIGKILL)
        raise TimedOut(f"the command did not end within {timeout:g} s")
    for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(s, forward)
    if timeout is not None:
        signal.signal(signal.SIGALRM, expired)
        signal.setitimer(signal.ITIMER_REAL, timeout)
    _, status = os.waitpid(child, 0)
    signal.setitimer(signal.ITIMER_REAL, 0)
    return 128 + os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


# --- cgroups -----------------------------------------------------------------------------------

def make_cgroup() -> Path | None:
    """A cgroup for all of it, the root of its cgroup namespace. None where the machine has no
    cgroups of version 2."""
    if not (CGROUPS / "cgroup.controllers").exists():
        say("this machine has no cgroups of version 2: tests of limits will fail")
        return None
    for old in CGROUPS.glob(CGROUP_PREFIX + "*"):
        pid = old.name.removeprefix(CGROUP_PREFIX)
        if not Path("/proc", pid).exists():  # left by a driver that was killed
            remove_cgroup(old)
    group = CGROUPS / f"{CGROUP_PREFIX}{os.getpid()}"
    try:
        enable_controllers(CGROUPS)
        # Only leaves hold processes once controllers are handed down: as below systemd.
        (group / "init").mkdir(parents=True, exist_ok=True)
    except OSError as e:
        say(f"cannot make cgroup {group}: {e}: tests of limits will fail")
        return None
    return group


def join(group: Path) -> None:
    """Moves this process there."""
    (group / "cgroup.procs").write_text("0", encoding="ascii")


def enable_controllers(group: Path) -> None:
    """Gives the children of a cgroup every controller it has; one that refuses is left out."""
    for name in (group / "cgroup.controllers").read_text(encoding="ascii").split():
        with contextlib.suppress(OSError):
            (group / "cgroup.subtree_control").write_text(f"+{name}", encoding="ascii")


def remove_cgroup(group: Path) -> None:
    """Ends what is in it and removes it with all below."""
    with contextlib.suppress(OSError):
        (group / "cgroup.kill").write_text("1", encoding="ascii")
    end = time.monotonic() + 10
    while group.exists() and time.monotonic() < end:
        for below, _, _ in os.walk(group, topdown=False):
            with contextlib.suppress(OSError):
                os.rmdir(below)
        time.sleep(0.02)  # until the killed are reaped
    if group.exists():
        say(f"cgroup {group} could not be removed")


# --- the root ----------------------------------------------------------------------------------

def check(code: int, what: str) -> None:
    if code != 0:
        err = ctypes.get_errno()
        raise OSError(err, f"{what}: {os.strerror(err)}")


def mount(src: str, dst: str, fstype: str, flags: int = 0, data: str = "") -> None:
    check(LIBC.mount(src.encode(), dst.encode(), fstype.encode(), flags, data.encode()),
          f"mount {fstype or src} on {dst}")


def set_up(tree: Path, visible: list[Path]) -> None:
    """The root, its file systems, devices and settings: as in the emulated host (init/boot.rs)."""
    mount("", "/", "", MS_REC | MS_PRIVATE)
    work = cache_dir() / "lab/.direct"  # only a place: what is mounted here is ours alone
    work.mkdir(exist_ok=True)
    mount("tmpfs", str(work), "tmpfs", 0, "mode=0755")
    new = work / "new"
    for d in ("upper", "work", "new"):
        (work / d).mkdir()
    mount("overlay", str(new), "overlay", 0,
          f"lowerdir={tree},upperdir={work}/upper,workdir={work}/work")
    present = [name for name in DEVICES if Path("/dev", name).exists()]
    nodes = {name: os.stat(f"/dev/{name}") for name in present}
    for source, place, fstype, options in MOUNTS:
        target = Path(f"{new}{place}")
        if not place.startswith("/sys/"):
            target.mkdir(parents=True, exist_ok=True)
        elif not target.is_dir():
            continue
        try:
            mount(source, str(target), fstype, 0, options)
        except OSError as e:
            say(f"left out: {e}")
    for name, node in nodes.items():
        path = Path(f"{new}/dev/{name}")
        path.parent.mkdir(exist_ok=True)
        os.mknod(path, node.st_mode, node.st_rdev)
        os.chmod(path, 0o666)
    modules = Path("/lib/modules")
    binds = [(d, f"{new}{d}") for d in visible]
    if modules.is_dir():
        binds.append((modules, f"{new}/usr/lib/modules"))
    for source, target in binds:
        os.makedirs(target, exist_ok=True)
        # Not with what is mounted below: the new root itself is, in the cache.
        mount(str(source), target, "", MS_BIND)
    os.chdir(new)
    # The old root comes to lie on the new one, and goes. runc's own pivot_root wants a root that
    # is a mount, not a directory of one.
    check(LIBC.syscall(SYS_PIVOT_ROOT, b".", b"."), "pivot_root")
    check(LIBC.umount2(b".", MNT_DETACH), "umount of the old root")
    os.chdir("/")
    # What systemd does too; runc and CNI count on propagation from the host's mounts.
    mount("", "/", "", MS_REC | MS_SHARED)
    settings()


def settings() -> None:
    """Limits, names and switches of a well set-up node; nothing of the machine itself."""
    for link, to in (("fd", "/proc/self/fd"), ("stdin", "/proc/self/fd/0"),
                     ("stdout", "/proc/self/fd/1"), ("stderr", "/proc/self/fd/2"),
                     ("ptmx", "pts/ptmx")):
        os.symlink(to, f"/dev/{link}")
    for what, soft, hard in ((resource.RLIMIT_NOFILE, 1 << 20, 1 << 20),
                             (resource.RLIMIT_MEMLOCK, -1, -1), (resource.RLIMIT_NPROC, -1, -1),
                             (resource.RLIMIT_CORE, 0, -1)):
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(what, (soft, hard))
    LIBC.sethostname(b"lab", 3)
    loopback_up()
    for path, text in (("/etc/hostname", "lab\n"),
                       ("/etc/hosts", "127.0.0.1 localhost lab\n::1 localhost\n"),
                       ("/etc/machine-id", uuid.uuid4().hex + "\n"),
                       ("/proc/sys/net/ipv4/ip_forward", "1")):
        with contextlib.suppress(OSError):
            Path(path).write_text(text, encoding="ascii")


def loopback_up() -> None:
    subprocess.run(["ip", "link", "set", "lo", "up"], check=False, stderr=subprocess.DEVNULL)


def supervise(args: list[str], env: dict[str, str], cwd: str) -> int:
    """PID 1's work: start the command, pass signals on, reap, return its code."""
    command = 0

    def forward(signum: int, _: object) -> None:
        if command:
            with contextlib.suppress(ProcessLookupError):
                os.kill(command, signum)
    # The terminal sends these to the whole group, the command included.
    for s in (signal.SIGINT, signal.SIGQUIT):
        signal.signal(s, signal.SIG_IGN if os.isatty(0) else forward)
    for s in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(s, forward)
    try:
        command = subprocess.Popen(args, env=env, cwd=cwd, restore_signals=True,
                                   preexec_fn=default_signals).pid
    except FileNotFoundError:
        say(f"cannot run {args[0]!r}: not found")
        return 127
    except OSError as e:
        say(f"cannot run {args[0]!r}: {e}")
        return 126
    while True:
        pid, status = os.wait()
        if pid == command:
            return 128 + os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


def default_signals() -> None:
    for s in (signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(s, signal.SIG_DFL)
