"""Output folders that are there whole or not at all."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder to write into, which takes its place when the block ends without an error.

    Until then it is a hidden sibling, and after an error nothing of it is left; an older folder stays as it was.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def write_json(path: Path, document: Any) -> None:
    """Sorted, indented, with a closing newline: equal documents are equal bytes."""
    path.write_text(json.dumps(document, indent=2, sort_keys=True) + "\n")
