"""A command in a group of its own: how it ends has a name, and nothing of it is left behind."""

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from tve_pipeline.flows.processes import End, Groups, end_of

PARENT = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import signal, time; {child}; time.sleep(60)"])
print(child.pid, flush=True)
time.sleep(60)
"""


def alive(pid: int) -> bool:
    """Whether it runs: a zombie, which its parent has yet to ask about, does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(
    ("returncode", "lines", "end"),
    [
        (0, [], "done"),
        (255, ["Traceback (most recent call last):", "KeyError: 'x'", "ERROR: failed to reproduce 'a'"], "failed"),
        (255, ["heads: params.yaml: heads.max_iter: expected at least 1, got 0", "ERROR: failed to run"], "refused"),
        (255, ["ERROR: failed to reproduce 'a': failed to run: python -m a, exited with -9"], "preempted"),
        (255, ["ERROR: failed to reproduce 'a': failed to run: python -m a, exited with 137"], "preempted"),
        (-15, [], "preempted"),
        (255, ["Traceback (most recent call last):", "OSError: [Errno 28] No space left on device"], "disk full"),
        (255, ["ERROR: Unable to acquire lock. Most likely another DVC process is running"], "locked"),
    ],
)
def test_an_end_has_a_name(returncode: int, lines: list[str], end: End) -> None:
    assert end_of(returncode, lines) == end


def test_lines_come_as_they_are_written_also_those_of_a_progress_bar() -> None:
    program = "import sys; print('one', flush=True); sys.stderr.write('10%\\r20%\\r\\n'); print('two')"
    lines: list[str] = []
    outcome = Groups().run([sys.executable, "-c", program], lines.append)
    assert (outcome.end, outcome.returncode) == ("done", 0)
    assert set(lines) == {"one", "10%", "20%", "two"}


def test_no_shell_reads_a_command(tmp_path: Path) -> None:
    lines: list[str] = []
    Groups().run([sys.executable, "-c", "import sys; print(sys.argv[1])", f"$(touch {tmp_path}/x); `id`"], lines.append)
    assert lines == [f"$(touch {tmp_path}/x); `id`"]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("child", ["pass", "signal.signal(signal.SIGTERM, signal.SIG_IGN)"], ids=["polite", "deaf"])
def test_children_of_a_killed_command_do_not_outlive_it(child: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tve_pipeline.flows.processes.GRACE_S", 1.0)
    children: list[int] = []

    def on_line(line: str) -> None:
        children.append(int(line))
        time.sleep(0.3)  # until the child has said what it ignores
        os.kill(os.getpgid(children[0]), signal.SIGKILL)  # the leader alone: its child is an orphan now

    groups = Groups()
    watch = threading.Timer(20, lambda: os.kill(children[0], signal.SIGKILL))
    watch.start()
    start = time.monotonic()
    outcome = groups.run([sys.executable, "-c", PARENT.replace("{child}", child)], on_line)
    watch.cancel()
    assert outcome.end == "preempted"
    assert not alive(children[0])
    assert time.monotonic() - start < 15


def test_all_groups_end_when_they_are_told_to() -> None:
    groups, children, outcomes = Groups(), list[int](), list[End]()
    command = [sys.executable, "-c", PARENT.replace("{child}", "pass")]
    threads = [
        threading.Thread(target=lambda: outcomes.append(groups.run(command, lambda x: children.append(int(x))).end))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    while len(children) < 2:
        time.sleep(0.05)
    groups.end_all()
    for thread in threads:
        thread.join()
    assert outcomes == ["preempted", "preempted"]
    assert not any(map(alive, children))


def test_an_error_while_reading_ends_the_group() -> None:
    children: list[int] = []

    def on_line(line: str) -> None:
        children.append(int(line))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Groups().run([sys.executable, "-c", PARENT.replace("{child}", "pass")], on_line)
    assert not alive(children[0])
