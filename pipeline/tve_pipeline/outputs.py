"""Output folders and files that are there whole or not at all."""

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


def write_whole(path: Path, text: str) -> None:
    """A file that is there whole or, where it cannot be written, as it was; its folder is made if absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text)
    partial.replace(path)


def write_json(path: Path, document: Any) -> None:
    """A document into a folder that is not there yet for others."""
    path.write_text(json_text(document))


def json_text(document: Any) -> str:
    """Sorted, indented, with a closing newline: equal documents are equal bytes."""
    return json.dumps(document, indent=2, sort_keys=True) + "\n"
