"""What dvc.lock says: its entries, their order, what is behind an artifact, and the key of a run."""

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

DVC_LOCK = "dvc.lock"
KEY_DIGITS = 16


def load_lock(root: Path) -> dict[str, Mapping[str, Any]]:
    """Stages of dvc.lock by name.

    Raises:
        ValueError: there is none.
    """
    path = root / DVC_LOCK
    if not path.is_file():
        raise ValueError(
            f"{path}: expected the lock of a DVC project, got no such file; run `dvc repro`, or name the root"
        )
    document = load_yaml(path.read_bytes())
    return dict((document or {}).get("stages") or {})


def load_yaml(text: bytes) -> Any:
    return yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))


def active_profile(root: Path) -> str:
    params = load_yaml((root / "params.yaml").read_bytes()) if (root / "params.yaml").is_file() else {}
    return str((params or {}).get("profile", ""))


def in_order(locked: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Stages, each after those whose outputs it reads; names decide where nothing else does."""
    remaining, done = dict(sorted(locked.items())), list[str]()
    producers = {name: paths(entry, "outs") for name, entry in locked.items()}
    while remaining:
        ready = [
            name
            for name, entry in remaining.items()
            if not any(
                other != name and other not in done and any(overlap(path, out) for out in producers[other])
                for path in paths(entry, "deps")
                for other in remaining
            )
        ]
        for name in ready or list(remaining):  # a lock with a circle was edited; what it says is compared all the same
            done.append(name)
            del remaining[name]
    return done


def paths(entry: Mapping[str, Any], kind: str) -> list[str]:
    """The paths of an entry's "deps" or "outs"."""
    return [str(each["path"]) for each in entry.get(kind) or ()]


def overlap(one: str, other: str) -> bool:
    """Whether two paths are the same, or one lies below the other."""
    return one == other or one.startswith(other + "/") or other.startswith(one + "/")


def of_profile(locked: Mapping[str, Any], profile: str) -> list[str]:
    """The stages of a profile, which their addresses begin with; "": all."""
    mark = re.compile(rf"@{re.escape(profile)}(-|$)")
    return [name for name in locked if not profile or "@" not in name or mark.search(name)]


def behind(locked: Mapping[str, Mapping[str, Any]], root: Path, artifacts: Sequence[str]) -> set[str]:
    """The stages that made the artifacts, and those before them."""
    found: set[str] = set()
    asked = []
    for artifact in artifacts:
        absolute = Path(os.path.abspath(artifact))
        relative = (
            absolute.relative_to(root.resolve()).as_posix() if absolute.is_relative_to(root.resolve()) else artifact
        )
        makers = [name for name, entry in locked.items() if any(overlap(relative, out) for out in paths(entry, "outs"))]
        if not makers:
            raise ValueError(f"{artifact}: expected an output of a stage in {DVC_LOCK}, got something that none made")
        asked += makers
    while asked:
        name = asked.pop()
        if name not in found:
            found.add(name)
            asked += [
                other
                for other, entry in locked.items()
                if other not in found
                and any(overlap(dep, out) for dep in paths(locked[name], "deps") for out in paths(entry, "outs"))
            ]
    return found


def profile_of(stage: str) -> str:
    """heads@scenes-vit-scenes is of profile scenes: profiles' names have no dash."""
    return stage.partition("@")[2].partition("-")[0]


def lock_key(entry: Mapping[str, Any]) -> str:
    """A digest of what an entry of dvc.lock says: command, parameters, inputs and outputs by md5."""
    params = {name: value for file in (entry.get("params") or {}).values() for name, value in file.items()}
    document = {"cmd": entry.get("cmd"), "params": params} | {
        kind: sorted((str(each["path"]), str(each.get("md5"))) for each in entry.get(kind) or ())
        for kind in ("deps", "outs")
    }
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()[:KEY_DIGITS]
