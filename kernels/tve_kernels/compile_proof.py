"""Proof without a GPU that every kernel compiles for the GPUs that it is meant for, spills nothing and fits on them.

    python -m tve_kernels.compile_proof [op ...] [--target sm_90 ...]

Triton's compiler and the vendors' assemblers need no device. Each case of each op's `kernel.CASES` is compiled for each
target into a fresh cache; registers and spills are what the assembler says of the very binary that Triton made.
"""

import argparse
import io
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from tve_kernels.compile_cases import CompileCase

OPS = ("pack_tokens", "ragged_attention", "pooled_attention", "residual_norm", "transfer_map")


@dataclass(frozen=True, slots=True)
class Target:
    backend: str
    arch: int | str
    warp_size: int
    shared_limit: int  # bytes that one block may have


TARGETS: Mapping[str, Target] = {
    "sm_80": Target("cuda", 80, 32, 163 * 1024),
    "sm_90": Target("cuda", 90, 32, 227 * 1024),
    "sm_100": Target("cuda", 100, 32, 227 * 1024),
    "gfx942": Target("hip", "gfx942", 64, 64 * 1024),
}


@dataclass(frozen=True, slots=True)
class Usage:
    registers: int  # of a thread: on AMD vector registers, accumulation registers among them
    spilled_bytes: int  # of a thread: written to memory for want of registers


@dataclass(frozen=True, slots=True)
class Row:
    """What one case needs of one target."""

    op: str
    case: str
    target: str
    usage: Usage | None = None  # None where it does not compile
    shared_bytes: int = 0
    error: str = ""

    @property
    def problem(self) -> str:
        """Why this is no proof, or ""."""
        if self.usage is None:
            return f"does not compile: {self.error}"
        if self.usage.spilled_bytes:
            return f"spills {self.usage.spilled_bytes} bytes"
        if self.shared_bytes > (limit := TARGETS[self.target].shared_limit):
            return f"needs more shared memory than {limit} bytes"
        return ""


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints a line for each case and target; 1 where one does not compile, spills or does not fit, else 0."""
    parser = argparse.ArgumentParser(prog="compile_proof", description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("ops", nargs="*", metavar="op", help=f"of {', '.join(OPS)}; all where none is named")
    parser.add_argument("--target", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    asked = parser.parse_args(arguments)
    problems = 0
    try:
        rows = _rows(asked.ops or OPS, asked.target)
        print(f"{'op':<18} {'case':<34} {'target':<7} {'registers':>9} {'spills B':>9} {'shared B':>9}")
        for row in rows:
            problems += bool(row.problem)
            print(_line(row), flush=True)
    except ValueError as error:
        parser.error(str(error))
    return int(problems > 0)


def prove(ops: Iterable[str] = OPS, targets: Iterable[str] = tuple(TARGETS)) -> list[Row]:
    """A row for every case of these ops on each of these targets, also for those with a problem.

    Raises:
        ValueError: an op without `kernel.CASES`, an unknown target, or TRITON_INTERPRET=1 in this process.
    """
    return list(_rows(ops, targets))


def ptxas_usage(log: str) -> Usage:
    """What `ptxas -v` says of an entry function and of the functions that it calls.

    Raises:
        ValueError: a log that does not say it.
    """
    registers = [int(count) for count in re.findall(r"Used (\d+) registers", log)]
    stores = [int(count) for count in re.findall(r"(\d+) bytes spill stores", log)]
    loads = [int(count) for count in re.findall(r"(\d+) bytes spill loads", log)]
    if not (registers and stores and loads):
        raise ValueError(f"log: expected registers and spills as ptxas -v prints them, got {log!r}")
    return Usage(max(registers), max(sum(stores), sum(loads)))


def amdgcn_usage(assembly: str) -> Usage:
    """What the metadata at the end of AMD assembly say of the kernel.

    Scalar registers spill into lanes of vector registers, which is no traffic, so they do not count.

    Raises:
        ValueError: assembly without them.
    """
    registers = re.search(r"^\s*\.vgpr_count:\s*(\d+)", assembly, re.MULTILINE)
    spilled = re.search(r"^\s*\.vgpr_spill_count:\s*(\d+)", assembly, re.MULTILINE)
    if not (registers and spilled):
        raise ValueError("assembly: expected .vgpr_count and .vgpr_spill_count in its metadata, got neither or one")
    return Usage(int(registers[1]), 4 * int(spilled[1]))


def _rows(ops: Iterable[str], targets: Iterable[str]) -> Iterator[Row]:
    targets = tuple(targets)
    if unknown := [name for name in targets if name not in TARGETS]:
        raise ValueError(f"target: expected one of {list(TARGETS)}, got {unknown}")
    _require_compiler()
    cases = [(op, case) for op in ops for case in _cases(op)]  # a missing op is found before anything is compiled
    return (_compiled(op, case, target) for op, case in cases for target in targets)


def _require_compiler() -> None:
    from triton import knobs

    if knobs.runtime.interpret:
        raise ValueError(
            "TRITON_INTERPRET: expected it unset, got 1, with which kernels are Python and compile to nothing; "
            "run this in a process without it"
        )


def _cases(op: str) -> tuple[CompileCase, ...]:
    name = f"tve_kernels.{op}.kernel"
    try:
        cases: tuple[CompileCase, ...] = import_module(name).CASES
    except ModuleNotFoundError as error:
        if error.name is None or not name.startswith(error.name):
            raise  # something that the kernel imports is missing, not the kernel
        raise ValueError(f"op: expected one with a kernel, got {op!r}, but there is no {name}; known: {OPS}") from error
    if not cases:
        raise ValueError(f"op: expected {name}.CASES to hold a case, got none; a kernel without cases is not proved")
    return cases


def _compiled(op: str, case: CompileCase, target: str) -> Row:
    from triton import TritonError, knobs

    said = io.StringIO()
    with tempfile.TemporaryDirectory() as fresh, knobs.cache.scope(), knobs.nvidia.scope(), redirect_stdout(said):
        knobs.cache.dir = fresh  # a cached binary would come without the assembler's log
        knobs.nvidia.dump_ptxas_log = True
        try:
            binary = _binary(case, TARGETS[target])
        except (TritonError, RuntimeError) as error:  # the compiler's own errors, and those of its passes
            lines = str(error).strip().splitlines() or [type(error).__name__]
            return Row(op, case.name, target, error=lines[-1].strip())
    amd = "amdgcn" in binary.asm
    usage = amdgcn_usage(binary.asm["amdgcn"]) if amd else ptxas_usage(said.getvalue())
    return Row(op, case.name, target, usage, binary.metadata.shared)


def _binary(case: CompileCase, target: Target) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = list(case.kernel.arg_names)
    given = {**case.signature, **dict.fromkeys(case.constexprs, "constexpr")}
    if set(given) != set(names):
        raise ValueError(
            f"case {case.name!r}: expected a type or value for each of {names}, got {sorted(given)}; "
            f"they differ in {sorted(set(given) ^ set(names))}"
        )
    if unknown := case.divisible_by_16 - set(case.signature):
        raise ValueError(f"case {case.name!r}: expected divisible_by_16 to name arguments, got {sorted(unknown)}")
    source = ASTSource(
        case.kernel,
        {name: given[name] for name in names},
        dict(case.constexprs),
        {(names.index(name),): [["tt.divisibility", 16]] for name in sorted(case.divisible_by_16)},
    )
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    return triton.compile(source, GPUTarget(target.backend, target.arch, target.warp_size), options)


def _line(row: Row) -> str:
    usage = row.usage
    counts = (usage.registers, usage.spilled_bytes, row.shared_bytes) if usage else ("-", "-", "-")
    numbers = " ".join(f"{count:>9}" for count in counts)
    return f"{row.op:<18} {row.case:<34} {row.target:<7} {numbers}{'  ' + row.problem if row.problem else ''}"


if __name__ == "__main__":
    sys.exit(main())
