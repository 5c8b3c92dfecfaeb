"""Writes the code that each stage imports into its deps in dvc.yaml, so that nobody maintains them by hand.

    python -m tve_pipeline.graph

A stage's code is the closure of its module's imports within this repository: those in functions count, those
under TYPE_CHECKING do not. So `dvc repro` runs again what a change of code reaches, and nothing else.
"""

import ast
import re
import sys
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# A package's modules may import this package and those above it.
PACKAGES = {
    "tve_kernels": Path("kernels/tve_kernels"),
    "tve": Path("tve"),
    "tve_pipeline": Path("pipeline/tve_pipeline"),
}
DVC_FILE = ROOT / "dvc.yaml"
STAGE = re.compile(r"  (\w+):")
CODE = re.compile(r"      - ((?:kernels|pipeline|tve)/\S+)")


def main(argv: list[str]) -> None:
    if argv:
        raise SystemExit(f"expected no arguments, got {argv}")
    text = DVC_FILE.read_text()
    written = with_code_deps(text)
    DVC_FILE.write_text(written)
    print(f"{DVC_FILE.name}: {'deps rewritten' if written != text else 'deps are right'}")


def with_code_deps(dvc_yaml: str) -> str:
    """The text of dvc.yaml with each stage's code, sorted, at the end of its deps; all else as it was.

    Raises:
        ValueError: a stage without a line `deps:`.
    """
    head, *blocks = re.split(r"^(?=  \w+:$)", dvc_yaml, flags=re.MULTILINE)
    return head + "".join(_with_code(block) for block in blocks)


def stage_closure(stage: str) -> list[str]:
    """Paths, relative to the root, of every module that `tve_pipeline.<stage>` imports, itself included.

    A file that shares a module's name, such as its template, belongs to it.
    """
    seen: set[str] = set()
    pending = [f"tve_pipeline.{stage}"]
    while pending:
        module = pending.pop()
        if module not in seen:
            seen.add(module)
            pending.extend({module.rpartition(".")[0]} - {""} | imports(module))
    modules = [ROOT / module_path(module) for module in seen]
    files = (path for module in modules for path in module.parent.glob(f"{module.stem}.*"))
    return sorted(path.relative_to(ROOT).as_posix() for path in files)


@cache
def imports(module: str) -> frozenset[str]:
    """The modules of this repository that `module` imports directly, wherever in its code.

    Raises:
        ValueError: an import that names no module: a relative one, or one of a package's lazy attributes.
    """
    path = module_path(module)
    found: set[str] = set()
    for node in _runtime_nodes(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if _is_ours(alias.name)}
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                raise ValueError(f"{path}:{node.lineno}: expected an absolute import, got a relative one")
            if node.module is not None and _is_ours(node.module):
                found |= {_imported(node.module, alias.name, path, node.lineno) for alias in node.names}
    return frozenset(found)


def module_path(module: str) -> Path:
    """The file of one of our modules, relative to the root.

    Raises:
        ValueError: there is none.
    """
    package, *rest = module.split(".")
    base = PACKAGES[package].joinpath(*rest)
    for path in (base.with_suffix(".py"), base / "__init__.py"):
        if (ROOT / path).is_file():
            return path
    raise ValueError(f"{module}: expected a module at {base}.py")


def _imported(package: str, name: str, path: Path, line: int) -> str:
    """The module that `from package import name` reads: a submodule, or the one that defines the name."""
    file = module_path(package)
    if file.name != "__init__.py":
        return package
    if (ROOT / file.parent / f"{name}.py").is_file() or (ROOT / file.parent / name / "__init__.py").is_file():
        return f"{package}.{name}"
    if "__getattr__" in (ROOT / file).read_text():
        raise ValueError(f"{path}:{line}: expected {name} from the module that defines it, got {package}")
    return package


def _runtime_nodes(tree: ast.Module) -> list[ast.AST]:
    nodes: list[ast.AST] = []
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        nodes.append(node)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            pending.extend(node.orelse)
        else:
            pending.extend(ast.iter_child_nodes(node))
    return nodes


def _is_ours(module: str) -> bool:
    return module.split(".")[0] in PACKAGES


def _with_code(block: str) -> str:
    stage = STAGE.match(block)
    assert stage is not None
    lines = [line for line in block.splitlines(keepends=True) if not CODE.match(line)]
    if "    deps:\n" not in lines:
        raise ValueError(f"dvc.yaml: stage {stage[1]}: expected a line `deps:`")
    end = lines.index("    deps:\n") + 1
    while lines[end].startswith("      - "):
        end += 1
    code = [f"      - {path}\n" for path in stage_closure(stage[1])]
    return "".join(lines[:end] + code + lines[end:])


if __name__ == "__main__":
    main(sys.argv[1:])
