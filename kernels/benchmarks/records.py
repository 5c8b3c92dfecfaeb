"""Where benchmark rows go, and what each says of the machine, the versions and the commit that it was measured with.

A row is appended to one CSV file per kind of benchmark and device; rows are never changed.
"""

import csv
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from tve.precision import has_bfloat16

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "kernels" / "results"
TESTS = ("tests/kernels", "tests/test_evaluator.py", "tests/test_evaluator_architectures.py")


@dataclass(frozen=True, slots=True)
class Circumstances:
    """With what a run was measured: the first columns of each of its rows."""

    date: str  # UTC, of the run's start
    commit: str  # with "+" where files differ from it; "unknown" outside a repository
    machine: str
    threads: int
    torch: str
    timm: str
    triton: str  # "" where it is not installed


def circumstances(device: torch.device, commit: str | None = None) -> Circumstances:
    """Those of this process, now.

    Args:
        device: where the programs run.
        commit: where the repository's history is not at hand; asked of git otherwise.
    """
    return Circumstances(
        date=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        commit=commit or _commit(),
        machine=machine(device),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        timm=version("timm"),
        triton=_version("triton"),
    )


def machine(device: torch.device) -> str:
    """The GPU's or the processor's own name, and of a processor the widest vectors that PyTorch uses on it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    description = Path("/proc/cpuinfo")
    if description.is_file() and (
        found := re.search(r"^model name\s*:\s*(.+)$", description.read_text(), re.MULTILINE)
    ):
        name = found[1].strip()
    else:
        name = platform.processor() or platform.machine()
    bfloat16 = ", bfloat16" if has_bfloat16(device) else ""
    return f"{name} ({torch.backends.cpu.get_cpu_capability()}{bfloat16})"


def results_file(kind: str, device: torch.device) -> Path:
    """Where rows of this kind and device go, `kernels/results/<kind>_<device>.csv`."""
    slug = re.sub(r"[^a-z0-9]+", "-", machine(device).lower()).strip("-")
    return RESULTS / f"{kind}_{slug}.csv"


def append(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Appends rows to a CSV file, which is made with their header where it is missing.

    Raises:
        ValueError: the file's header is another.
    """
    if not rows:
        return
    columns = list(rows[0])
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and path.stat().st_size:
        with path.open(newline="") as file:
            header = next(csv.reader(file))
        if header != columns:
            raise ValueError(f"{path}: expected the columns {columns}, got {header}; move the file away")
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if not file.tell():
            writer.writeheader()
        writer.writerows(rows)


def columns_of(given: object, *, without: tuple[str, ...] = ()) -> dict[str, object]:
    """A dataclass as columns; numbers with four significant digits, None as nothing."""
    values = asdict(given)  # type: ignore[call-overload]
    names = [field.name for field in fields(given) if field.name not in without]  # type: ignore[arg-type]
    return {name: number(values[name]) for name in names}


def number(value: object) -> object:
    """A float with four significant digits, never in powers of ten; None as ""; anything else as it is."""
    if value is None:
        return ""
    if not isinstance(value, float):
        return value
    return f"{float(f'{value:.4g}'):f}".rstrip("0").rstrip(".")


def red_tests(tests: Sequence[str] = TESTS) -> str:
    """What pytest says of tests that fail, or "" where all pass: of red code no speed is printed."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    finished = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    return "" if finished.returncode == 0 else finished.stdout + finished.stderr


def _commit() -> str:
    def git(*arguments: str) -> str:
        finished = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
        return finished.stdout.strip() if finished.returncode == 0 else ""

    head = git("rev-parse", "--short", "HEAD")
    if not head:
        return "unknown"
    return head + ("+" if git("status", "--porcelain") else "")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
