"""Who may write in this working copy, and which flow runs are alive: locks that end with the process that holds them.

Everything lies under `.tve/flows`. A lock is a file that is locked with `flock`, so that a process that was killed
with -9 leaves none behind, and a process number that is used again deceives nobody.
"""

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

FOLDER = Path(".tve", "flows")
POLL_S = 1.0
_owned: list[int] = []  # never closed: the kernel does it


@contextlib.contextmanager
def sole_writer(who: str, say: Callable[[str], None] = print, *, shared: bool = False) -> Iterator[int]:
    """Holds this working copy, waiting for whoever does; yields the lock's file descriptor.

    The descriptor may be handed on to a process that outlives its parent for a moment (`processes.Groups`): the copy is
    free when the last of them has ended.

    Args:
        who: is told to those who wait.
        say: is told who is waited for.
        shared: for those who only read: beside each other, not beside a writer.
    """
    path = _file("writer.lock")
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        waited_for = ""
        while not _taken(descriptor, fcntl.LOCK_SH if shared else fcntl.LOCK_EX):
            holder = path.read_text().strip() or "another flow"
            if holder != waited_for:
                say(f"this working copy is held by {holder}; waiting for it")
                waited_for = holder
            time.sleep(POLL_S)
        if not shared:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{who} (process {os.getpid()})\n".encode(), 0)
        yield descriptor
    finally:
        if not shared and _taken(descriptor, fcntl.LOCK_EX):
            os.ftruncate(descriptor, 0)
        os.close(descriptor)


def own(flow_run: str) -> None:
    """Says of a flow run that this process is the one that runs it, until the process ends.

    Not until the run ends: between its last line and the server's word that it completed, it can still be killed.
    """
    descriptor = os.open(_file("runs", f"{flow_run}.lock"), os.O_RDWR | os.O_CREAT, 0o644)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    _owned.append(descriptor)


def dead_runs() -> list[str]:
    """Flow runs of this working copy whose process has ended, whether or not the server knows how."""
    return sorted(path.stem for path in (FOLDER / "runs").glob("*.lock") if _is_free(path))


def forget(flow_run: str) -> None:
    """Of a dead run, once it has been seen to."""
    (FOLDER / "runs" / f"{flow_run}.lock").unlink(missing_ok=True)


def _is_free(path: Path) -> bool:
    try:
        descriptor = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        return _taken(descriptor, fcntl.LOCK_EX)
    finally:
        os.close(descriptor)


def _taken(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _file(*parts: str) -> Path:
    path = FOLDER.joinpath(*parts)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
