"""The library imports where there are torch and timm, but none of the pipeline's packages, and no Triton."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
ABSENT = ("dvc", "prefect", "webdataset", "captum", "pydantic", "jinja2", "matplotlib", "scipy", "sklearn", "triton")
PROGRAM = """
import importlib, pathlib, sys
for name in sys.argv[1].split(","):
    sys.modules[name] = None  # an import of it now fails
for root in ("tve", "kernels/tve_kernels"):
    for file in sorted(pathlib.Path(root).rglob("*.py")):
        if file.name != "kernel.py":  # Triton's programs, imported when one runs
            parts = file.with_suffix("").parts[root.count("/") :]
            importlib.import_module(".".join(parts).removesuffix(".__init__"))
import tve
print(tve.load_backbone.__name__, tve.Explainer.__name__)
"""


def test_every_module_of_the_library_imports_without_the_pipelines_packages() -> None:
    command = [sys.executable, "-c", PROGRAM, ",".join(ABSENT)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == ["load_backbone", "Explainer"], done.stderr
