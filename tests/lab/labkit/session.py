# SPDX-License-Identifier: Apache-2.0
"""One run of a command in a lab: streams, signals, terminal, watchdogs, exit code."""

import errno
import fcntl
import os
import re
import select
import selectors
import signal
import socket
import struct
import termios
import time
import tty
from dataclasses import dataclass, field

from .common import Interrupted, LabFailure, TimedOut, say
from .machine import Machine

PROTOCOL = 1

# What an idle machine needs a twentieth of.
BOOT_DEADLINE = float(os.environ.get("BULKHEAD_LAB_BOOT_DEADLINE", "180"))
SILENCE_DEADLINE = float(os.environ.get("BULKHEAD_LAB_SILENCE_DEADLINE", "60"))
# A starting machine always computes. One that only idles has lost a timer interrupt (seen on busy
# machines, see README.md) and would idle until the boot deadline.
IDLE_WINDOW = 12.0
IDLE_SHARE = 0.05
CHUNK = 1 << 16
# The kernel's own lines only, by their time stamp or by wording no other program's line begins with.
DEATH = re.compile(
    rb"^(?:<\d>)?\[\s*\d+\.\d+\]\s*(?:\[\s*[TC]\d+\]\s*)?("
    rb"Kernel panic - not syncing.*|Oops: .*|Oops\[.*|BUG: (?!workqueue).*|general protection fault.*|"
    rb"kernel BUG at .*|Internal error: .*|double fault: .*)", re.M)


@dataclass
class Job:
    """What the command is and how it is connected."""
    args: list[str]
    env: dict[str, str]
    cwd: str
    pty: bool
    timeout: float | None = None
    verbose: bool = False


@dataclass
class Times:
    """Moments of a run, in seconds since the start of the emulator."""
    start: float = field(default_factory=time.monotonic)
    ready: float | None = None
    started: float | None = None
    end: float | None = None

    def since(self) -> float:
        return time.monotonic() - self.start


class Session:
    """Connects a machine and a job. `run` returns the command's exit code or raises LabFailure."""

    def __init__(self, machine: Machine, job: Job, modules_dir: str) -> None:
        self.machine, self.job, self.modules_dir = machine, job, modules_dir
        self.times = Times()
        self.sel = selectors.DefaultSelector()
        self.pending: dict[str, bytearray] = {"ctl": bytearray(), "in": bytearray()}
        self.ctl_line = bytearray()
        self.console_tail = bytearray()
        self.last_sign = time.monotonic()
        self.last_active = (time.monotonic(), 0.0)
        self.got = {"out": 0, "err": 0}
        self.closed: set[str] = set()
        self.final: tuple[int, int, int] | None = None
        self.death: tuple[float, str] | None = None
        self.stdin_open = False
        self.stdin_taken = False  # then a second attempt would miss what the first has read
        self.output_given = False
        self.signals: list[int] = []
        self.interrupted = 0

    # --- the loop --------------------------------------------------------------------------

    def run(self) -> int:
        wake_r, wake_w = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        old_wake = signal.set_wakeup_fd(wake_w, warn_on_full_buffer=False)
        wanted = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGWINCH]
        old = {s: signal.signal(s, lambda n, _: self.signals.append(n)) for s in wanted}
        saved_tty = None
        try:
            if self.job.pty and os.isatty(0):
                saved_tty = termios.tcgetattr(0)
                tty.setraw(0)
            self._register(wake_r)
            self._send_job()
            while True:
                code = self._finished()
                if code is not None:
                    self.times.end = self.times.since()
                    return code
                for key, mask in self.sel.select(self._patience()):
                    key.data(mask)
                self._handle_signals()
                self._watch()
        finally:
            if saved_tty is not None:
                termios.tcsetattr(0, termios.TCSADRAIN, saved_tty)
            for s, handler in old.items():
                signal.signal(s, handler)
            signal.set_wakeup_fd(old_wake)
            os.close(wake_r)
            os.close(wake_w)
            self.sel.close()

    def _register(self, wake_r: int) -> None:
        def drain(_: int) -> None:
            try:
                os.read(wake_r, 512)
            except BlockingIOError:
                pass
        self.sel.register(wake_r, selectors.EVENT_READ, drain)
        m = self.machine
        assert m.console is not None and m.errors is not None
        for sock in [*m.streams.values(), m.console, m.errors]:
            sock.setblocking(False)
        reg = self.sel.register
        reg(m.streams["ctl"], selectors.EVENT_READ, self._on_ctl)
        reg(m.streams["out"], selectors.EVENT_READ, lambda _: self._on_output("out", 1))
        reg(m.streams["err"], selectors.EVENT_READ, lambda _: self._on_output("err", 2))
        reg(m.console, selectors.EVENT_READ, lambda _: self._on_console())
        reg(m.errors, selectors.EVENT_READ, lambda _: self._on_errors())

    def _patience(self) -> float:
        """Until the next moment something must be checked though nothing happens."""
        return 0.05 if self.final or self.death else 1.0

    def _finished(self) -> int | None:
        if self.final is None:
            return None
        code, out, err = self.final
        return code if self.got["out"] >= out and self.got["err"] >= err else None

    def _send_job(self) -> None:
        j = self.job
        rows, cols = window_size()
        fields = [*(f"arg={a}" for a in j.args), *(f"env={k}={v}" for k, v in j.env.items()),
                  f"cwd={j.cwd}", f"pty={int(j.pty)}", f"rows={rows}", f"cols={cols}",
                  f"modules={self.modules_dir}", f"clock={time.time_ns()}"]
        fields += [f"share={s.tag}:{'ro' if s.read_only else 'rw'}:{s.path}"
                   for s in self.machine.shares if s.tag != "root"]
        raw = b"".join(os.fsencode(f) + b"\0" for f in fields)
        self._send("ctl", b"JOB %d\n" % len(raw) + raw)

    # --- to the lab ------------------------------------------------------------------------

    def _send(self, port: str, data: bytes) -> None:
        self.pending[port] += data
        self._flush(port)

    def _flush(self, port: str) -> None:
        sock, buf = self.machine.streams[port], self.pending[port]
        try:
            while buf:
                del buf[:sock.send(buf[:CHUNK])]
        except BlockingIOError:
            pass
        except OSError:
            buf.clear()  # the emulator is gone; _watch says so
        handler = self._on_ctl if port == "ctl" else self._on_in
        events = (selectors.EVENT_READ if port == "ctl" else 0)
        events |= selectors.EVENT_WRITE if buf else 0
        if sock in self.sel.get_map():
            if events:
                self.sel.modify(sock, events, handler)
            else:
                self.sel.unregister(sock)
        elif events:
            self.sel.register(sock, events, handler)
        if port == "in":
            self._want_stdin(self.stdin_open and len(buf) < 4 * CHUNK)

    def _on_in(self, _: int) -> None:
        self._flush("in")

    def _want_stdin(self, want: bool) -> None:
        have = 0 in self.sel.get_map()
        if want and not have:
            try:
                self.sel.register(0, selectors.EVENT_READ, lambda _: self._on_stdin())
            except PermissionError:
                self._on_stdin(everything=True)  # a plain file is always readable: no epoll
            except OSError:
                self._end_stdin()
        elif have and not want:
            self.sel.unregister(0)

    def _on_stdin(self, everything: bool = False) -> None:
        while True:
            try:
                data = os.read(0, CHUNK)
            except BlockingIOError:
                return
            except OSError:
                data = b""  # closed, or a background process without its terminal
            if not data:
                self._end_stdin()
                return
            self.stdin_taken = True
            self.pending["in"] += struct.pack("<I", len(data)) + data
            if not everything:
                self._flush("in")
                return
            if len(self.pending["in"]) > 64 * CHUNK:
                # a long file: the rest when this has gone
                self.stdin_open = False
                self._flush("in")
                self.stdin_open = True
                if self.pending["in"]:
                    return

    def _end_stdin(self) -> None:
        if self.stdin_open:
            self.stdin_open = False
            self._send("in", struct.pack("<I", 0))

    # --- from the lab ----------------------------------------------------------------------

    def _on_ctl(self, mask: int) -> None:
        if mask & selectors.EVENT_WRITE:
            self._flush("ctl")
        if not mask & selectors.EVENT_READ:
            return
        data = self._read(self.machine.streams["ctl"])
        if data:
            self.last_sign = time.monotonic()
        self.ctl_line += data
        while (end := self.ctl_line.find(b"\n")) >= 0:
            line = self.ctl_line[:end].decode(errors="replace")
            del self.ctl_line[:end + 1]
            self._obey(line)

    def _obey(self, line: str) -> None:
        verb, _, rest = line.partition(" ")
        if verb == "READY":
            if int(rest.split()[0]) != PROTOCOL:
                raise LabFailure(f"PID 1 speaks protocol {rest}, the driver {PROTOCOL}: "
                                 "run `lab --fresh prepare`")
            self.times.ready = self.times.since()
        elif verb == "STARTED":
            self.times.started = self.times.since()
            self.stdin_open = True
            self._want_stdin(True)
        elif verb == "EXIT":
            code, out, err = (int(w) for w in rest.split())
            self.final = code, out, err
        elif verb == "BROKEN":
            raise LabFailure(f"the lab's host could not be set up: {rest}")
        elif verb == "NOTE":
            if not self.death:
                say(rest)
        if self.job.verbose and verb not in ("HB", "NOTE"):
            say(f"[{self.times.since():.2f} s] {line}")

    def _on_output(self, name: str, fd: int) -> None:
        data = self._read(self.machine.streams[name])
        self.got[name] += len(data)
        if not data or name in self.closed:
            return
        self.output_given = True
        try:
            write_all(fd, data)
        except OSError as e:
            if e.errno not in (errno.EPIPE, errno.EIO, errno.EBADF):
                raise LabFailure(f"cannot write the command's output: {e}") from e
            # Nobody reads any more: let the command find out the usual way.
            self.closed.add(name)
            self._send("ctl", b"CLOSE %d\n" % fd)

    def _on_console(self) -> None:
        assert self.machine.console is not None
        data = self._read(self.machine.console)
        if self.job.verbose and data:
            write_all(2, data)
        self.console_tail = (self.console_tail + data)[-CHUNK:]
        found = DEATH.search(self.console_tail)
        if found:  # again with each piece: the first may end in the middle of the line
            when = self.death[0] if self.death else time.monotonic()
            self.death = (when, found.group(1).decode(errors="replace").strip())

    def _on_errors(self) -> None:
        assert self.machine.errors is not None
        for line in self._read(self.machine.errors).decode(errors="replace").splitlines():
            say(f"emulator: {line}")

    def _read(self, sock: socket.socket) -> bytes:
        try:
            data = sock.recv(CHUNK)
        except BlockingIOError:
            return b""
        except OSError:
            data = b""
        if not data:
            self.sel.unregister(sock)  # its process has ended; _watch says so
        return data

    # --- signals and watchdogs -------------------------------------------------------------

    def _handle_signals(self) -> None:
        pending, self.signals = self.signals, []
        for n in pending:
            if n == signal.SIGWINCH:
                if self.job.pty:
                    self._send("ctl", b"WINCH %d %d\n" % window_size())
                continue
            self.interrupted += 1
            if self.times.started is None or self.interrupted > 1:
                raise Interrupted(n)
            self._send("ctl", b"SIG %d\n" % n)

    def _watch(self) -> None:
        now = time.monotonic()
        if self.final:
            return
        if self.death:
            when, text = self.death
            # a moment for the rest of the report
            if now - when > 2.0 or self.machine.dead():
                raise LabFailure(f"the lab's kernel failed: {text}")
            return
        dead = self.machine.dead()
        if dead:
            self._on_console_rest()
            text = self.death[1] if self.death else dead
            raise LabFailure(f"the lab's host ended: {text}")
        if self.times.started is None:
            if self.times.since() > BOOT_DEADLINE:
                raise LabFailure(f"the lab did not start within {BOOT_DEADLINE:.0f} s")
            self._watch_idle(now)
        elif now - self.last_sign > SILENCE_DEADLINE:
            raise LabFailure(f"the lab's host is silent for {SILENCE_DEADLINE:.0f} s")
        if self.job.timeout is not None and self.times.started is not None:
            if self.times.since() - self.times.started > self.job.timeout:
                raise TimedOut(f"the command did not end within {self.job.timeout:g} s")

    def _watch_idle(self, now: float) -> None:
        since, before = self.last_active
        if now - since < IDLE_WINDOW:
            return
        active = self.machine.activity()
        if active - before < IDLE_SHARE * (now - since):
            raise LabFailure(f"the lab's host fell idle during its start ({now - since:.0f} s)")
        self.last_active = (now, active)

    def _on_console_rest(self) -> None:
        assert self.machine.console is not None
        while select.select([self.machine.console], [], [], 0)[0]:
            before = len(self.console_tail)
            self._on_console()
            if len(self.console_tail) == before:
                break


def window_size() -> tuple[int, int]:
    """Rows and columns of our terminal."""
    for fd in (0, 1, 2):
        try:
            rows, cols, _, _ = struct.unpack("HHHH", fcntl.ioctl(fd, termios.TIOCGWINSZ, b"\0" * 8))
        except OSError:
            continue
        if rows and cols:
            return rows, cols
    return 24, 80


def write_all(fd: int, data: bytes) -> None:
    """write(2) to the end, also on a descriptor someone made non-blocking."""
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(fd, view):]
        except BlockingIOError:
            select.select([], [fd], [])
