# SPDX-License-Identifier: Apache-2.0
"""With hardware KVM: the command runs on this machine, in namespaces that go away with it.

A child becomes PID 1 of a new PID namespace, with mounts and a network of its own, and gives the
command the scratch directories it would have in the lab. When the child ends, the kernel kills
every process that is left; when the driver dies, the kernel kills the child.
"""

import ctypes
import os
import signal
import subprocess
import sys
from pathlib import Path

from .common import LIBC, TimedOut, die_with, say, shared_dirs

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x00020000, 0x04000000, 0x08000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
MS_REC, MS_PRIVATE = 0x4000, 1 << 18
SCRATCH = ("/tmp", "/var/lib/containerd", "/var/lib/bulkhead", "/run/bulkhead", "/run/containerd",
           "/run/netns")


def run(args: list[str], env: dict[str, str], cwd: str, timeout: float | None,
        extra: list[Path]) -> int:
    """Runs the command; returns its exit code, 128+n for signal n."""
    flags = CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWPID | CLONE_NEWNET
    uid, gid = os.geteuid(), os.getegid()
    isolated = True
    if uid != 0:
        flags |= CLONE_NEWUSER
    if LIBC.unshare(flags) != 0:
        isolated = False
        say(f"cannot make namespaces ({os.strerror(ctypes.get_errno())}): the command runs without")
    elif uid != 0:
        Path("/proc/self/setgroups").write_text("deny", encoding="ascii")
        Path("/proc/self/uid_map").write_text(f"0 {uid} 1", encoding="ascii")
        Path("/proc/self/gid_map").write_text(f"0 {gid} 1", encoding="ascii")
    driver = os.getpid()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            # In the new PID namespace getppid() is 0: the driver is outside.
            die_with(0 if isolated else driver)
            if isolated:
                set_up(extra)
            code = supervise(args, env, cwd)
        except OSError as e:
            say(f"cannot set up namespaces: {e}")
            code = 86
        finally:
            sys.stdout.flush()
            os._exit(code)
    return wait_for(child, timeout)


def wait_for(child: int, timeout: float | None) -> int:
    """Passes our signals on to the child and waits for its end."""
    def forward(signum: int, _: object) -> None:
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


def mount(src: str, dst: str, fstype: str, flags: int = 0, data: str = "") -> None:
    if LIBC.mount(src.encode(), dst.encode(), fstype.encode(), flags, data.encode()) != 0:
        err = ctypes.get_errno()
        raise OSError(err, f"mount {fstype} on {dst}: {os.strerror(err)}")


def set_up(extra: list[Path]) -> None:
    """Private mounts, /proc of the new namespace, scratch directories, loopback."""
    mount("", "/", "", MS_REC | MS_PRIVATE)
    mount("proc", "/proc", "proc")
    keep = [*shared_dirs(), *extra, Path.cwd()]
    for d in SCRATCH:
        # A checkout below /tmp must stay visible, then /tmp stays the host's.
        if any(k.is_relative_to(d) for k in keep):
            continue
        try:
            os.makedirs(d, exist_ok=True)
            mount("tmpfs", d, "tmpfs", 0, "mode=1777" if d == "/tmp" else "mode=0755")
        except OSError as e:
            say(f"no scratch on {d}: {e}")
    subprocess.run(["ip", "link", "set", "lo", "up"], check=False, stderr=subprocess.DEVNULL)


def supervise(args: list[str], env: dict[str, str], cwd: str) -> int:
    """PID 1's work: start the command, pass signals on, reap, return its code."""
    command = 0

    def forward(signum: int, _: object) -> None:
        if command:
            try:
                os.kill(command, signum)
            except ProcessLookupError:
                pass
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
