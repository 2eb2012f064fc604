"""execve of a thread among others: they end, the process keeps its number."""

import os
import sys
import threading
import time

if len(sys.argv) > 1:
    same = os.getpid() == int(sys.argv[2])
    print("after", sys.argv[1], "same number:", same, "threads:", len(os.listdir("/proc/self/task")))
    if sys.argv[1] == "3":
        print("execs ok", flush=True)
        sys.exit(0)
turn = int(sys.argv[1]) + 1 if len(sys.argv) > 1 else 1
sys.stdout.flush()


def become():
    # Time for the others to be where they sleep.
    for _ in range(3):
        os.sched_yield()
    os.execv(sys.executable, [sys.executable, __file__, str(turn), str(os.getpid())])


def busy():
    while True:
        pass


for work in (busy, lambda: time.sleep(1000), lambda: os.read(os.pipe()[0], 1)):
    threading.Thread(target=work, daemon=True).start()
if turn % 2:
    threading.Thread(target=become).start()
    threading.Event().wait()
else:
    become()
