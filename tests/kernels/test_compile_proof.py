"""The compile proof finds what it is for: a kernel that spills, does not compile or does not fit."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tve_kernels.compile_proof import TARGETS, Row, Usage, amdgcn_usage, prove, ptxas_usage

pytest.importorskip("triton")

KERNELS = Path(__file__).parents[2] / "kernels"

PTXAS = """
ptxas info    : Compiling entry function 'attend' for 'sm_90a'
ptxas info    : Function properties for attend
    40 bytes stack frame, 24 bytes spill stores, 32 bytes spill loads
ptxas info    : Used 72 registers, used 1 barriers, 24 bytes cumulative stack size
"""
AMDGCN = """
    .sgpr_spill_count: 3
    .symbol:         attend.kd
    .vgpr_count:     256
    .vgpr_spill_count: 38
    .wavefront_size: 64
"""
# A tile that one warp must hold while it is summed: 4 registers a thread for N = 16, 512 for N = 128. N must be even.
PROBE = """
import triton
import triton.language as tl
from tve_kernels.compile_cases import CompileCase

@triton.jit
def normalise(x_ptr, stride, N: tl.constexpr):
    tl.static_assert(N % 2 == 0, "odd")
    at = x_ptr + tl.arange(0, N)[:, None] * stride + tl.arange(0, N)[None, :]
    x = tl.load(at)
    tl.store(at, x / tl.sum(x))

def case(name, n, num_warps):
    signature = {"x_ptr": "*fp32", "stride": "i32"}
    return CompileCase(name, normalise, signature, {"N": n}, frozenset(signature), num_warps)

CASES = (case("fits", 16, 4), case("spills", 128, 1), case("no kernel", 1, 1))
"""
RUN = """
import sys
import tve_kernels
tve_kernels.__path__.append(sys.argv[1])  # ops of this test's own
from tve_kernels.compile_proof import main
sys.exit(main(sys.argv[2:]))
"""


def proof(folder: Path, *arguments: str, interpret: bool = False) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(KERNELS), "PYTHONWARNINGS": "ignore"}
    if interpret:
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-c", RUN, str(folder), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture
def probe(tmp_path: Path) -> Path:
    """A folder with one op, "probe", whose cases fit, spill and do not compile."""
    (tmp_path / "probe").mkdir()
    (tmp_path / "probe" / "kernel.py").write_text(PROBE)
    return tmp_path


def test_an_op_has_a_row_for_each_case_and_target(probe: Path) -> None:
    kernel = probe / "probe" / "kernel.py"
    kernel.write_text(PROBE.replace(', case("spills", 128, 1), case("no kernel", 1, 1))', ', case("fits too", 16, 2))'))
    done = proof(probe, "probe")
    assert done.returncode == 0, done.stdout + done.stderr
    header, *rows = done.stdout.splitlines()
    assert header.split()[:3] == ["op", "case", "target"]
    expected = [(case, target) for case in ("fits", "fits too") for target in TARGETS]
    assert len(rows) == len(expected)
    for row, (case, target) in zip(rows, expected, strict=True):
        *words, registers, spilled, _ = row.split()
        assert words == ["probe", *case.split(), target]
        assert 1 <= int(registers) <= 255
        assert int(spilled) == 0


def test_a_kernel_that_spills_or_does_not_compile_is_told_and_fails(probe: Path) -> None:
    done = proof(probe, "probe", "--target", "sm_80")
    assert done.returncode == 1, done.stdout + done.stderr
    _, fits, spills, broken = done.stdout.splitlines()
    assert fits.split()[-2] == "0"
    assert spills.endswith(f"spills {spills.split()[4]} bytes")
    assert "does not compile: " in broken


def test_what_cannot_be_proved_is_an_error(probe: Path) -> None:
    missing = proof(probe, "probe", "absent")
    assert missing.returncode == 2
    assert "there is no tve_kernels.absent.kernel" in missing.stderr
    assert len(missing.stdout.splitlines()) == 0
    interpreted = proof(probe, "probe", interpret=True)
    assert interpreted.returncode == 2
    assert "TRITON_INTERPRET: expected it unset" in interpreted.stderr


def test_a_target_that_is_unknown_is_an_error() -> None:
    with pytest.raises(ValueError, match="target: expected one of"):
        prove(["ragged_attention"], ["sm_70"])


def test_too_much_shared_memory_is_a_problem() -> None:
    for name, target in TARGETS.items():
        assert not Row("op", "case", name, Usage(100, 0), target.shared_limit).problem
        assert "shared memory" in Row("op", "case", name, Usage(100, 0), target.shared_limit + 1).problem


def test_registers_and_spills_are_read_from_the_assemblers_words() -> None:
    assert ptxas_usage(PTXAS) == Usage(registers=72, spilled_bytes=32)
    assert ptxas_usage(PTXAS.replace("ptxas info", "ptxas-blackwell info")) == Usage(72, 32)
    assert amdgcn_usage(AMDGCN) == Usage(registers=256, spilled_bytes=4 * 38)


@pytest.mark.parametrize("line", ["Used 72 registers", "24 bytes spill stores", "32 bytes spill loads"])
def test_a_log_without_them_is_an_error(line: str) -> None:
    with pytest.raises(ValueError, match="log: expected registers and spills"):
        ptxas_usage(PTXAS.replace(line, ""))


@pytest.mark.parametrize("line", [".vgpr_count:     256", ".vgpr_spill_count: 38"])
def test_assembly_without_them_is_an_error(line: str) -> None:
    with pytest.raises(ValueError, match="assembly: expected"):
        amdgcn_usage(AMDGCN.replace(line, ""))
