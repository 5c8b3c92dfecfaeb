"""dvc.yaml names the code and the parameters that each stage reads, and imports point one way."""

import ast
import re
from typing import Any

import pytest
import yaml

from tve_pipeline.entry import SECTION_OF
from tve_pipeline.graph import DVC_FILE, PACKAGES, ROOT, imports, module_path, stage_closure, with_code_deps

STAGES: dict[str, dict[str, Any]] = yaml.safe_load(DVC_FILE.read_text())["stages"]
MODULES = sorted(
    ".".join((package, *path.relative_to(ROOT / folder).with_suffix("").parts)).removesuffix(".__init__")
    for package, folder in PACKAGES.items()
    for path in (ROOT / folder).rglob("*.py")
)
# What a call reads of params.yaml; {} is the stage's argument.
READERS = {"load_section": "{0}", "load_dataset": "datasets", "load_backbone_params": "backbones"}


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_depends_on_exactly_the_code_that_it_imports(stage: str) -> None:
    listed = [path for path in STAGES[stage]["deps"] if path.split("/")[0] in ("kernels", "pipeline", "tve")]
    assert listed == stage_closure(stage), "run `make graph`"


def test_the_graph_tool_leaves_a_right_file_as_it_is() -> None:
    text = DVC_FILE.read_text()
    assert with_code_deps(text) == text


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_depends_on_every_section_of_params_that_it_loads(stage: str) -> None:
    tree = ast.parse((ROOT / module_path(f"tve_pipeline.{stage}")).read_text())
    named = {param.split(".")[0] for param in STAGES[stage].get("params", [])}
    read = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in READERS:
            first = node.args[0]
            literal = first.value if isinstance(first, ast.Constant) else None
            section = READERS[node.func.id].format(literal)
            if section != "None":
                read.add(section)
    assert read <= named


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_is_called_with_the_arguments_that_it_expects(stage: str) -> None:
    *_, last = ast.parse((ROOT / module_path(f"tve_pipeline.{stage}")).read_text()).body
    given = re.findall(r"\$\{item\.(\w+)\}", STAGES[stage]["cmd"])
    assert isinstance(last, ast.If)
    expected = ", ".join([repr(stage), "main", *(repr(name.upper()) for name in given)])
    assert ast.unparse(last.body) == f"run_stage({expected})"
    assert {name.upper() for name in given} <= SECTION_OF.keys()


@pytest.mark.parametrize("stage", ["evaluate", "evaluate_shapley", "evaluate_two_networks"])
def test_another_explainer_has_no_method_evaluated_again_that_does_not_read_it(stage: str) -> None:
    deps = STAGES[stage]["deps"]
    assert not [path for path in deps if "/export/" in path or "/pretrain/" in path]
    assert stage == "evaluate_two_networks" or "tve/explainer.py" not in deps


def test_packages_import_one_way() -> None:
    order = list(PACKAGES)
    for module in MODULES:
        allowed = order[: order.index(module.split(".")[0]) + 1]
        assert {name.split(".")[0] for name in imports(module)} <= set(allowed), module


def test_one_module_of_the_library_imports_the_kernels() -> None:
    importing = {
        module
        for module in MODULES
        if module.split(".")[0] != "tve_kernels" and any(name.startswith("tve_kernels") for name in imports(module))
    }
    assert importing == {"tve.kernels"}


def test_no_two_modules_import_each_other_even_through_others() -> None:
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, f"a circle: {' → '.join((*path, module))}"
        if module not in done:
            for imported in imports(module):
                visit(imported, (*path, module))
            done.add(module)

    for module in MODULES:
        visit(module, ())


def test_no_stage_imports_another_stage_but_check_which_reads_their_sections() -> None:
    allowed = {"check"}
    for stage in set(STAGES) - allowed:
        others = {f"tve_pipeline.{other}" for other in STAGES} - {f"tve_pipeline.{stage}"}
        assert not others & imports(f"tve_pipeline.{stage}"), stage


def test_no_output_on_record_lies_inside_another_ones() -> None:
    """Of a stage that was split up, DVC keeps the old entry."""
    locked = yaml.safe_load((ROOT / "dvc.lock").read_text())["stages"]
    paths = sorted(out["path"] for entry in locked.values() for out in entry.get("outs", []))
    inside = [(outer, inner) for outer in paths for inner in paths if inner.startswith(f"{outer}/")]
    assert not inside, "take the old stage out of dvc.lock"
