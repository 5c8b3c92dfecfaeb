"""Which backend is chosen, on each kind of machine, and the reason that is given."""

from dataclasses import replace
from importlib.metadata import PackageNotFoundError

import pytest
import torch

from tve_kernels import backend
from tve_kernels.backend import Choice, Facts, choose, decide, facts

HOPPER = Facts("cuda", triton=(3, 6), capability=(9, 0))
ROCM = Facts("cuda", triton=(3, 9))
INTERPRETER = Facts("cpu", triton=(3, 6), interpreted=True)
MACHINES = {
    "Hopper": (HOPPER, "Triton 3.6 on cuda"),
    "Ampere, the oldest": (replace(HOPPER, capability=(8, 0)), "Triton 3.6 on cuda"),
    "ROCm": (ROCM, "Triton 3.9 on cuda"),
    "a later Triton": (replace(HOPPER, triton=(4, 0)), "Triton 4.0 on cuda"),
}
OBSTACLES = {
    "no Triton": (replace(HOPPER, triton=None), "Triton is not installed"),
    "old Triton": (replace(HOPPER, triton=(3, 5)), "Triton is 3.5, older than 3.6"),
    "very old Triton": (replace(HOPPER, triton=(2, 9)), "Triton is 2.9, older than 3.6"),
    "old GPU": (replace(HOPPER, capability=(7, 5)), "the GPU has compute capability 7.5, below 8.0"),
    "interpreter on a GPU": (replace(HOPPER, interpreted=True), "TRITON_INTERPRET is 1, which runs kernels on the CPU"),
    "CPU": (replace(INTERPRETER, interpreted=False), "tensors are on a CPU and TRITON_INTERPRET is not 1"),
    "CPU without Triton": (Facts("cpu"), "Triton is not installed"),
    "Apple": (Facts("mps", triton=(3, 6)), "tensors are on mps, not on an NVIDIA or AMD GPU"),
}
ALL = [given for given, _ in (*MACHINES.values(), *OBSTACLES.values())] + [INTERPRETER]


@pytest.mark.parametrize(("given", "reason"), MACHINES.values(), ids=MACHINES.keys())
def test_auto_takes_triton_where_it_runs_fast(given: Facts, reason: str) -> None:
    assert decide("auto", given) == Choice("triton", reason)


@pytest.mark.parametrize(("given", "obstacle"), OBSTACLES.values(), ids=OBSTACLES.keys())
def test_auto_takes_torch_where_no_kernel_runs_and_says_why(given: Facts, obstacle: str) -> None:
    assert decide("auto", given) == Choice("torch", obstacle)


def test_auto_takes_torch_where_only_the_interpreter_runs_kernels() -> None:
    assert decide("auto", INTERPRETER) == Choice("torch", "Triton's interpreter is for tests, not for speed")


@pytest.mark.parametrize("given", ALL, ids=str)
def test_torch_is_an_order_that_every_machine_obeys(given: Facts) -> None:
    assert decide("torch", given) == Choice("torch", "asked for")


@pytest.mark.parametrize("given", [*(given for given, _ in MACHINES.values()), INTERPRETER], ids=str)
def test_triton_is_obeyed_where_a_kernel_runs(given: Facts) -> None:
    assert decide("triton", given) == Choice("triton", "asked for")


@pytest.mark.parametrize(("given", "obstacle"), OBSTACLES.values(), ids=OBSTACLES.keys())
def test_triton_is_refused_where_no_kernel_runs_and_the_error_says_why(given: Facts, obstacle: str) -> None:
    with pytest.raises(ValueError, match=r"^backend: expected a device that runs Triton kernels") as refusal:
        decide("triton", given)
    assert f"got one where {obstacle}; use 'auto'" in str(refusal.value)


@pytest.mark.parametrize("given", ALL, ids=str)
def test_an_unknown_backend_is_refused_everywhere(given: Facts) -> None:
    with pytest.raises(ValueError, match=r"backend: expected one of \['auto', 'triton', 'torch'\], got 'cuda'"):
        decide("cuda", given)  # type: ignore[arg-type]


def installed(monkeypatch: pytest.MonkeyPatch, **versions: str) -> None:
    """Only these distributions, "_" for "-"."""

    def version(name: str) -> str:
        try:
            return versions[name.replace("-", "_")]
        except KeyError:
            raise PackageNotFoundError(name) from None

    monkeypatch.setattr(backend, "version", version)


@pytest.mark.parametrize(
    ("name", "version", "expected"),
    [
        ("triton", "3.6.0", (3, 6)),
        ("pytorch_triton_rocm", "3.6.0+git0ec280cf", (3, 6)),
        ("pytorch_triton", "3.10.0.dev20260101+git1a2b3c4d", (3, 10)),
        ("triton_rocm", "3.9", (3, 9)),
        ("triton_windows", "3.6.0", None),
    ],
)
def test_triton_is_found_under_each_name_that_pytorch_ships_it_by(
    name: str, version: str, expected: tuple[int, int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed(monkeypatch, **{name: version})
    assert facts(torch.device("cpu")).triton == expected


@pytest.mark.parametrize(("value", "interpreted"), [("1", True), ("0", False), (None, False)])
def test_the_interpreter_is_on_where_the_environment_says_so(
    value: str | None, interpreted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if value is None:
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    else:
        monkeypatch.setenv("TRITON_INTERPRET", value)
    assert facts(torch.device("cpu")).interpreted is interpreted


@pytest.mark.parametrize(
    ("device", "hip", "available", "capability"),
    [
        ("cuda:1", None, True, (9, 1)),  # of the device asked for, not of the current one
        ("cuda:1", "6.4", True, None),  # AMD's numbers are others
        ("cuda:1", None, False, None),
        ("cpu", None, True, None),
    ],
)
def test_the_capability_is_that_of_an_nvidia_device(
    device: str,
    hip: str | None,
    available: bool,
    capability: tuple[int, int] | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda asked: (9, asked.index))
    assert facts(torch.device(device)).capability == capability
    assert facts(torch.device(device)).device_type == device.split(":")[0]


def test_choose_asks_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, pytorch_triton_rocm="3.9.0")
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert choose("auto", "cuda") == Choice("triton", "Triton 3.9 on cuda")
    assert choose("auto", torch.device("cpu")).backend == "torch"
