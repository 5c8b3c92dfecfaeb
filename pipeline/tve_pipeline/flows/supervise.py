"""Runs a command, and ends its whole process group when whoever asked for it is gone, killed with -9 or not.

python -I -S supervise.py ALIVE GRACE_S COMMAND...

ALIVE is the reading end of a pipe whose other end the asking process holds: it closes when that process ends, however
it ends. Standard library alone, and no package of ours, so that it starts in some milliseconds.
"""

import os
import signal
import subprocess
import sys
import threading
import time


def main() -> None:
    alive, grace_s, command = int(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: None)  # it outlives the polite signal; a handler is not inherited by a command
    process = subprocess.Popen(command)
    threading.Thread(target=end_group_after, args=(alive, grace_s), daemon=True).start()
    returncode = process.wait()
    if returncode < 0:  # it ends as the command did
        signal.signal(-returncode, signal.SIG_DFL) if -returncode not in (signal.SIGKILL, signal.SIGSTOP) else None
        os.kill(os.getpid(), -returncode)
    sys.exit(returncode)


def end_group_after(alive: int, grace_s: float) -> None:
    os.read(alive, 1)  # returns when the pipe closes
    os.killpg(0, signal.SIGTERM)
    time.sleep(grace_s)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main()
