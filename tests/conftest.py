"""One thread a process: the tensors of tests are small, and threads that wait for each other cost time.

Where the extra `pipeline` is not installed (a GPU machine with the core alone), the tests of the core run, and pytest
says at the end which files were left out.
"""

import os
from collections.abc import Iterator
from importlib.util import find_spec

import pytest
import torch

torch.set_num_threads(1)
if not torch.cuda.is_available():  # before anything imports Triton: kernels then run in its interpreter
    os.environ.setdefault("TRITON_INTERPRET", "1")

MISSING = [
    name for name in ("captum", "dvc", "prefect", "pydantic", "sklearn", "webdataset") if find_spec(name) is None
]
NEED_THE_PIPELINE = [
    "flows",
    "lineage",
    "architecture/test_profiles_share_one_graph.py",
    "architecture/test_stage_dependencies.py",
    "baselines",
    "fidelity/test_detection.py",
    "fidelity/test_road.py",
    "fidelity/test_robustness.py",
    "fidelity/test_sanity.py",
    "test_backbone_training.py",
    "test_check.py",
    "test_entry.py",
    "test_evaluation.py",
    "test_goals_evaluation.py",
    "test_heads.py",
    "test_methods.py",
    "test_params.py",
    "test_report.py",
    "test_shards.py",
    "test_sources.py",
]
collect_ignore = NEED_THE_PIPELINE if MISSING else []


@pytest.fixture(scope="session", autouse=True)
def own_settings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test makes a signing key among the user's settings, or signs with one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CONFIG_HOME", str(tmp_path_factory.mktemp("settings")))
        patch.delenv("TVE_SIGNING_KEY", raising=False)
        yield


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What was left out, and why."""
    if MISSING:
        terminalreporter.write_line(f"without {', '.join(MISSING)}: left out {', '.join(NEED_THE_PIPELINE)}")
