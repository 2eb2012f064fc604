# SPDX-License-Identifier: Apache-2.0
"""The processes behind one lab: QEMU and a virtiofsd for each shared directory.

Everything between them goes over descriptors passed at start (socket pairs, an abstract socket
whose name the kernel chooses): there is no run directory, no port and no name to collide or to be
left behind. Every process asks the kernel to be killed when the driver dies.
"""

import os
import signal
import socket
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from .common import LabFailure, die_with
from .parts import Parts

PORTS = ("ctl", "in", "out", "err")

KERNEL_CMDLINE = (
    "console=ttyS0 quiet panic=-1 oops=panic mitigations=off nokaslr tsc=reliable apparmor=0 "
    # a CPU that is emulated on a busy machine is slow without being stuck
    "watchdog_thresh=60 rcupdate.rcu_cpu_stall_timeout=120 "
    "audit=0 random.trust_cpu=on cgroup_no_v1=all rdinit=/init")


@dataclass
class Share:
    """A directory of the host and where the lab sees it."""
    tag: str
    source: Path
    path: Path
    read_only: bool = False
    constant: bool = False  # nobody changes it while the lab runs: cache without asking


@dataclass
class Machine:
    """A running emulator. `streams` are our ends of its ports, `console` of its serial line."""
    parts: Parts
    shares: list[Share]
    mem_mib: int
    cpus: int
    streams: dict[str, socket.socket] = field(default_factory=dict)
    console: socket.socket | None = None
    errors: socket.socket | None = None
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def start(self) -> None:
        try:
            self._start()
        except OSError as e:
            self.stop()
            raise LabFailure(f"cannot start the emulator: {e}") from e

    def _start(self) -> None:
        passed: list[socket.socket] = []

        def pair() -> tuple[socket.socket, int]:
            ours, theirs = socket.socketpair()
            passed.append(theirs)
            return ours, theirs.fileno()

        self.errors, err_fd = pair()
        args = []
        for i, share in enumerate(self.shares):
            sock = self._virtiofsd(share, err_fd)
            passed.append(sock)
            args += ["-chardev", f"socket,id=fs{i},fd={sock.fileno()}",
                     "-device", f"vhost-user-fs-pci,chardev=fs{i},tag={share.tag},queue-size=512"]
        args += ["-device", "virtio-serial-pci,max_ports=8"]
        for nr, name in enumerate(PORTS, 1):
            self.streams[name], fd = pair()
            args += ["-chardev", f"socket,id={name},fd={fd}",
                     "-device", f"virtserialport,chardev={name},name={name},nr={nr}"]
        self.console, fd = pair()
        args += ["-chardev", f"socket,id=console,fd={fd}", "-serial", "chardev:console"]
        self.processes["qemu"] = self._spawn(
            [*self._qemu(), "-name", "bulkhead-lab", "-M", "q35,memory-backend=ram,usb=off,vmport=off",
             "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
             "-accel", "tcg,thread=multi,tb-size=512", "-cpu", "max,la57=off",
             "-smp", str(self.cpus), "-m", str(self.mem_mib),
             "-object", f"memory-backend-memfd,id=ram,size={self.mem_mib}M,share=on",
             "-kernel", str(self.parts.kernel.dir / "vmlinux"),
             "-initrd", str(self.parts.initramfs.dir / "initramfs.cpio"),
             "-append", f"{KERNEL_CMDLINE} {os.environ.get('BULKHEAD_LAB_CMDLINE', '')}", *args],
            [s.fileno() for s in passed], err_fd)
        for s in passed:
            s.close()

    def _qemu(self) -> list[str]:
        base = self.parts.qemu.dir
        share = base / "usr/share"
        return [*own_libc(base), str(base / "usr/bin/qemu-system-x86_64"),
                "-L", str(share / "qemu"), "-L", str(share / "seabios")]

    def _virtiofsd(self, share: Share, err_fd: int) -> socket.socket:
        """Starts the file server of a share and returns a connection to it."""
        tree = self.parts.root.dir / "tree"
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind("")  # the kernel picks an abstract address: no file, no collision
        listener.listen(1)
        cache = ["--cache=always"] if share.constant else ["--cache=auto"]
        self.processes[f"virtiofsd {share.tag}"] = self._spawn(
            [*own_libc(tree), str(tree / "usr/libexec/virtiofsd"), f"--fd={listener.fileno()}",
             f"--shared-dir={share.source}", "--sandbox=none", "--seccomp=none",
             "--inode-file-handles=prefer", "--xattr", "--log-level=error", *cache],
            [listener.fileno()], err_fd)
        client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        client.connect(listener.getsockname())
        listener.close()
        return client

    def _spawn(self, cmd: list[str], fds: list[int], err_fd: int) -> subprocess.Popen[bytes]:
        # A process group of its own: the terminal's Ctrl-C is for the command, not for them.
        driver = os.getpid()
        return subprocess.Popen(
            cmd, stdin=subprocess.DEVNULL, stdout=err_fd, stderr=err_fd, pass_fds=fds, cwd="/",
            process_group=0, preexec_fn=lambda: die_with(driver))

    def stop(self) -> None:
        """Ends everything at once; the lab's host has nothing worth an orderly end."""
        for p in self.processes.values():
            if p.poll() is None:
                p.send_signal(signal.SIGKILL)
        for p in self.processes.values():
            p.wait()
        for s in [*self.streams.values(), self.console, self.errors]:
            if s is not None:
                s.close()

    def activity(self) -> float:
        """Seconds the emulator's threads have run or waited for a CPU; inf where unknown."""
        total = 0
        try:
            for task in Path(f"/proc/{self.processes['qemu'].pid}/task").iterdir():
                ran, waited, _ = (task / "schedstat").read_text().split()
                total += int(ran) + int(waited)
        except (OSError, ValueError):
            return float("inf")
        return total / 1e9

    def dead(self) -> str | None:
        """Names a process that has ended though it should run."""
        for name, p in self.processes.items():
            if p.poll() is not None:
                return f"{name} ended with {p.returncode}"
        return None


def own_libc(tree: Path) -> list[str]:
    """Runs a program of that tree with the tree's own dynamic linker and libraries."""
    dirs = [tree / "lib/x86_64-linux-gnu", tree / "usr/lib/x86_64-linux-gnu"]
    linker = next((d / "ld-linux-x86-64.so.2" for d in dirs
                   if (d / "ld-linux-x86-64.so.2").exists()), None)
    if linker is None:
        raise LabFailure(f"{tree} has no dynamic linker: rebuild it with `lab --fresh prepare`")
    libs = ":".join(str(d) for d in [*dirs, *(d / "pulseaudio" for d in dirs)])
    return [str(linker), "--library-path", libs]


def raise_nofile() -> None:
    """File servers hold a descriptor for each directory in use."""
    import resource
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    want = 1 << 18
    for limit in ((want, max(want, hard)), (hard, hard)):
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, limit)
            return
        except (ValueError, OSError):
            continue
