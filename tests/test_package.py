"""What `import tve` offers."""

import importlib
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType

import pytest

import tve

ROOT = Path(__file__).parents[1]


def test_every_public_name_is_an_object_and_no_module_even_when_all_modules_are_imported() -> None:
    for file in sorted((ROOT / "tve").rglob("*.py")):
        importlib.import_module(".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"))
    for name in tve.__all__:
        first, again = getattr(tve, name), getattr(tve, name)
        assert first is again
        assert not isinstance(first, ModuleType), name


def test_public_names_and_the_version_are_listed_before_any_is_read() -> None:
    program = "import sys, tve; print(*dir(tve)); assert 'torch' not in sys.modules"
    listed = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert set(listed.split()) == {*tve.__all__, "__version__"}


def test_the_version_is_that_of_the_installed_distribution_or_an_error_that_asks_for_it() -> None:
    try:
        expected = version("transferable-vision-explainer")
    except PackageNotFoundError:  # read from a checkout that nobody installed
        with pytest.raises(AttributeError, match="pip install it"):
            _ = tve.__version__
    else:
        assert tve.__version__ == expected


def test_an_unknown_name_is_an_error_that_lists_the_public_ones() -> None:
    with pytest.raises(AttributeError, match=r"no attribute 'explain'; public names: .*Explainer"):
        _ = tve.explain


def test_the_library_says_that_it_is_typed() -> None:
    assert (ROOT / "tve" / "py.typed").is_file()
