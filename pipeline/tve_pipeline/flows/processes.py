"""A command in a process group of its own: its lines as they come, its end by name, and no child left behind.

`dvc repro` that is killed leaves the stage's process running, so everything is told to the group, not to the process.
"""

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

End = Literal["done", "preempted", "locked", "storage gone", "disk full", "refused", "failed"]
TRANSIENT: frozenset[End] = frozenset({"preempted", "locked", "storage gone"})  # what another try may mend
SUPERVISOR = Path(__file__).with_name("supervise.py")
GRACE_S = 20.0  # from the polite signal to the one that cannot be refused
LINES_KEPT = 200  # by which an end is told
KILLED = re.compile(r"exited with (-\d+|137|143)\b")
FULL = re.compile(r"No space left on device|Disk quota exceeded|\[Errno 28\]")
GONE = re.compile(r"Stale file handle|Transport endpoint is not connected|Input/output error|Host is down")
LOCKED = re.compile(r"Unable to acquire lock|is busy, it is being blocked by")


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a command ended."""

    end: End
    returncode: int
    last_lines: tuple[str, ...]


class Groups:
    """The process groups that are alive; all are told to end when the flow is."""

    def __init__(self) -> None:
        self._alive: dict[int, subprocess.Popen[str]] = {}
        self._lock = threading.Lock()

    def run(
        self,
        command: Sequence[str],
        on_line: Callable[[str], None],
        environment: Mapping[str, str] | None = None,
        keep_open: Sequence[int] = (),
    ) -> Outcome:
        """Runs a command to its end; whatever ends this call or this process, ends the whole group.

        Args:
            command: no shell reads it.
            on_line: is given every line, standard error's among them; of a progress bar each state is a line.
            environment: added to this process's own.
            keep_open: file descriptors, such as a lock's, that stay open for as long as the group is watched over.
        """
        path = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
        read_end, write_end = os.pipe()  # the supervisor reads it; it closes when this process is gone, however it went
        supervised = [sys.executable, "-I", "-S", str(SUPERVISOR), str(read_end), str(GRACE_S), *command]
        process = subprocess.Popen(
            supervised,
            pass_fds=(read_end, *keep_open),
            env=os.environ | {"PATH": path} | dict(environment or {}),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,  # universal newlines: a progress bar's carriage return ends a line
            errors="replace",
            start_new_session=True,
        )
        os.close(read_end)
        with self._lock:
            self._alive[process.pid] = process
        last: deque[str] = deque(maxlen=LINES_KEPT)
        # Children of a killed leader hold the pipe that is read below: they end when it does, not when they are done.
        watch = threading.Thread(target=_end_with_leader, args=(process,), daemon=True)
        watch.start()
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if stripped := line.rstrip():
                    last.append(stripped)
                    on_line(stripped)
            process.wait()
        finally:
            end_group(process)
            watch.join()
            os.close(write_end)
            with self._lock:
                del self._alive[process.pid]
        return Outcome(end_of(process.returncode, last), process.returncode, tuple(last))

    def end_all(self) -> None:
        """Ends every group that is alive, and waits for it."""
        with self._lock:
            alive = list(self._alive.values())
        for process in alive:
            end_group(process)


def end_group(process: "subprocess.Popen[str]", grace_s: float | None = None) -> None:
    """Tells a whole group to end, kills what has not after the grace, and waits until none of it is left."""
    grace_s = GRACE_S if grace_s is None else grace_s
    for number in (signal.SIGTERM, signal.SIGKILL):
        if not _signalled(process.pid, number):
            break
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(grace_s)
        if _gone(process.pid, grace_s):
            break
    process.wait()


def end_of(returncode: int, last_lines: Sequence[str]) -> End:
    """What an exit code and the last lines mean.

    A user's mistake ends a stage with one line and no traceback (`entry.run_stage`); DVC itself ends with 255 when a
    stage failed, and says with which code.
    """
    if returncode == 0:
        return "done"
    text = "\n".join(last_lines)
    if FULL.search(text):
        return "disk full"
    if returncode < 0 or KILLED.search(text):
        return "preempted"
    if LOCKED.search(text):
        return "locked"
    if GONE.search(text):
        return "storage gone"
    return "failed" if "Traceback (most recent call last)" in text else "refused"


def _end_with_leader(process: "subprocess.Popen[str]") -> None:
    process.wait()
    end_group(process)


def _signalled(group: int, number: int) -> bool:
    """Whether there was anyone to be told; signal 0 tells nothing."""
    try:
        os.killpg(group, number)
    except (ProcessLookupError, PermissionError):  # macOS says the latter of a group of zombies
        return False
    return True


def _gone(group: int, within_s: float) -> bool:
    waiting = threading.Event()
    for _ in range(max(1, int(within_s / 0.05))):
        if not _signalled(group, 0):
            return True
        waiting.wait(0.05)
    return False
