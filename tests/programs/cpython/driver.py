"""Runs modules of CPython's own test suite and prints how each test ended: `RESULT NAME VERDICT`.

    python3 driver.py SECONDS EXCLUDED MODULE...

Each class of tests runs in a fork of this process, so that a test which hangs or ends its process
costs only itself: it gets SECONDS, then its process is killed, and a new one goes on after it.
Names in the file EXCLUDED (or patterns; the first word of a line) are not run.
"""

import fnmatch
import importlib
import io
import os
import re
import select
import signal
import sys
import time
import traceback
import unittest

from test import support


class Told(unittest.TestResult):
    """Passes results on, a line each."""

    def __init__(self, pipe):
        super().__init__()
        self.pipe = pipe
        self.verdict = None
        self.why = ""

    def say(self, *words):
        os.write(self.pipe, (" ".join(words) + "\n").encode(errors="replace"))

    def startTest(self, test):
        super().startTest(test)
        self.verdict, self.why = "ok", ""
        self.say("BEGIN", name(test))

    def stopTest(self, test):
        super().stopTest(test)
        self.say("END", name(test), self.verdict, self.why)

    def bad(self, verdict, test, error):
        text = "".join(traceback.format_exception(*error))
        self.why = re.sub(r"\s*\n\s*", " | ", text.strip())[-1500:]
        self.verdict = verdict
        if self.verdict != "skip" and not isinstance(test, unittest.TestCase):
            # setUpClass and its like: no test of its own.
            self.say("END", name(test), verdict, self.why)

    def addError(self, test, error):
        self.bad("error", test, error)

    def addFailure(self, test, error):
        self.bad("fail", test, error)

    def addSubTest(self, test, subtest, error):
        if error is not None:
            self.bad("fail", test, error)

    def addSkip(self, test, reason):
        self.verdict, self.why = "skip", reason
        if not isinstance(test, unittest.TestCase):
            self.say("END", name(test), "skip", reason)

    def addExpectedFailure(self, test, error):
        pass

    def addUnexpectedSuccess(self, test):
        self.verdict = "fail"


def name(test):
    return test.id().split(" ")[0].removeprefix("test.") if isinstance(test, unittest.TestCase) else "class:" + str(test).replace(" ", "_")


def flat(suite):
    for one in suite:
        if isinstance(one, unittest.TestSuite):
            yield from flat(one)
        else:
            yield one


def run(tests, pipe):
    """In the child."""
    os.setpgid(0, 0)
    # Whoever asks for input there gets none; what tests print is not wanted.
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
    sys.__stdout__, sys.__stderr__ = sys.stdout, sys.stderr
    code = 0
    try:
        unittest.TestSuite(tests).run(Told(pipe))
    except BaseException:
        code = 1
    os._exit(code)


def watch(tests, seconds, report):
    """Runs tests of one class; gives those that did not get their turn."""
    left = list(tests)
    readable, writable = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(readable)
        run(tests, writable)
    os.close(writable)
    text, current, deadline = b"", None, time.monotonic() + seconds
    verdict = None
    while True:
        ready, _, _ = select.select([readable], [], [], max(0, deadline - time.monotonic()))
        if not ready:
            verdict = "hang"
            break
        more = os.read(readable, 65536)
        if not more:
            break
        *lines, text = (text + more).split(b"\n")
        for line in lines:
            words = line.decode(errors="replace").split(" ", 3)
            if words[0] == "BEGIN":
                current, deadline = words[1], time.monotonic() + seconds
                left = [t for t in left if name(t) != current]
            elif words[0] == "END":
                report(words[1], words[2], words[3] if len(words) > 3 else "")
                current, deadline = None, time.monotonic() + seconds
    os.close(readable)
    try:
        os.killpg(child, signal.SIGKILL)
    except ProcessLookupError:
        pass
    _, status = os.waitpid(child, 0)
    if current:
        report(current, verdict or "died", f"status {status}")
    elif verdict:
        report("class:" + type(tests[0]).__name__, verdict, "")
    elif status:
        # Nothing ran, or it ended between two tests.
        return []
    return left if verdict or status else []


def main():
    seconds, excluded, modules = float(sys.argv[1]), sys.argv[2], sys.argv[3:]
    patterns = [l.split()[0] for l in open(excluded) if l.strip() and not l.startswith("#")]
    os.chdir("/tmp")
    support.verbose = 0
    # As its own runner does: parts that need a real network, or gigabytes, are not wanted.
    support.use_resources = ["subprocess", "cpu", "walltime"]
    support.max_memuse = 0
    total = {}

    def report(test, verdict, why):
        total[verdict] = total.get(verdict, 0) + 1
        print("RESULT", test, verdict, why if verdict != "ok" else "", flush=True)

    for module in modules:
        loaded = importlib.import_module("test." + module)
        getattr(loaded, "setUpModule", lambda: None)()
        classes = {}
        for test in flat(unittest.defaultTestLoader.loadTestsFromModule(loaded)):
            if any(fnmatch.fnmatchcase(name(test), p) for p in patterns):
                report(name(test), "excluded", "")
                continue
            classes.setdefault(type(test), []).append(test)
        for tests in classes.values():
            while tests:
                tests = watch(tests, seconds, report)
        # Left by tests whose process was killed.
        unittest.case.doModuleCleanups()
    print("TOTAL", " ".join(f"{k}={v}" for k, v in sorted(total.items())), flush=True)


main()
