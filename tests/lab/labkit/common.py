# SPDX-License-Identifier: Apache-2.0
"""Paths, messages and errors shared by the lab's modules."""

import ctypes
import os
import signal
from pathlib import Path

# Exit codes of our own, apart from the command's; see README.md.
EXIT_LAB_FAILED = 86
EXIT_TIMEOUT = 124

REPO = Path(__file__).resolve().parents[3]
LAB_DIR = Path(__file__).resolve().parents[1]


class LabError(Exception):
    """The lab cannot do what was asked; the message names object, cause and remedy."""


class LabFailure(Exception):
    """The emulated host itself failed: not the command's fault, worth a retry."""


class Interrupted(Exception):
    """A signal ended the lab itself, not the command in it."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"ended by signal {signum}")
        self.code = 128 + signum


class TimedOut(Exception):
    """--timeout is over. The command's fault, so never retried."""
    code = EXIT_TIMEOUT


def cache_dir() -> Path:
    """Where every cached thing of the project lives."""
    base = os.environ.get("BULKHEAD_CACHE")
    return (Path(base) if base else Path.home() / ".cache" / "bulkhead").resolve()


def say(text: str) -> None:
    """A line of the lab's own on stderr, told apart from the command's output by its prefix."""
    try:
        os.write(2, f"lab: {text}\n".encode(errors="replace"))
    except OSError:
        pass


LIBC = ctypes.CDLL(None, use_errno=True)
PR_SET_PDEATHSIG = 1


def die_with(parent: int) -> None:
    """Between fork and exec: the kernel kills this process when the driver ends, however it ends."""
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # the driver was faster
        os._exit(1)


def hardware_kvm() -> bool:
    """True on a machine whose own CPU virtualises and whose /dev/kvm we may use.

    An emulated /dev/kvm exists on machines without the CPU flags: it opens, and is no use.
    """
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as f:
            flags = next((line.split() for line in f if line.startswith("flags")), [])
        if "svm" not in flags and "vmx" not in flags:
            return False
        os.close(os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC))
    except OSError:
        return False
    return True


def shared_dirs() -> list[Path]:
    """Directories that the command sees at the same paths as on the host, outermost only."""
    wanted = [REPO, cache_dir()]
    target = os.environ.get("CARGO_TARGET_DIR")
    if target:
        wanted.append(Path(target).resolve())
    return outermost(wanted)


def outermost(dirs: list[Path]) -> list[Path]:
    """Without duplicates and without directories that lie inside another of the list."""
    result: list[Path] = []
    for d in sorted(set(dirs), key=lambda p: len(p.parts)):
        if not any(d.is_relative_to(r) for r in result):
            result.append(d)
    return result
