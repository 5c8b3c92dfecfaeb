"""`params.yaml`, the one place for numbers: its loader, and the models of what several stages share.

Every key is known and required; an error names the full path of a wrong key and the keys that are known
there. Each stage's own section is a model in the stage's module. Only stage entry points read the file;
the library takes values.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from tve.removal import Removal

PARAMS_FILE = Path("params.yaml")
DEFAULT_DATA_FOLDER = "../shared/data"
# In file names, DVC's stage names and tar members these never need quoting.
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_]+$")]
Count = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """A section of params.yaml: no unknown key, no missing key, never changed."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


AnySection = TypeVar("AnySection", bound=BaseModel)


class RunParams(Section):
    """Section `run`: which of the profile's backbones and datasets the stage graph iterates over."""

    backbones: tuple[Name, ...] = Field(min_length=1)
    datasets: tuple[Name, ...] = Field(min_length=1)  # everything that `shards` makes
    pretrain_dataset: Name
    task_datasets: tuple[Name, ...] = Field(min_length=1)  # what `heads` and `evaluate` run on
    backbone_reads: str  # a path that the backbone stage depends on


class ScenesDataset(Section):
    """Generated pictures (see scenes.py), `splits[split]` of them each."""

    kind: Literal["scenes"]
    seed: int = Field(ge=0)
    labelled: bool
    splits: dict[Name, Count] = Field(min_length=1)
    shard_size: Count

    def split_names(self) -> tuple[str, ...]:
        return tuple(self.splits)


class SplitParams(Section):
    """Pictures whose split column holds `value`; at most `limit` of them, null for all."""

    value: str
    limit: Count | None


class HoldOutParams(Section):
    """`count` pictures set aside as the split `split`."""

    split: Name
    count: Count


class PicturesDataset(Section):
    """Pictures of a folder, a zip or a tar.

    `table` is a CSV in the source whose column `file` is a path below `folder`, and whose other columns
    give split and labels; without a table the first folder of a path is its split and the last one its
    label (the task's column is then `folder`). Splits are either named (`splits`) or drawn (`hold_out` of
    the pictures, and the `rest`).
    """

    kind: Literal["pictures"]
    source: str
    sha256: str | None = Field(pattern=r"^[0-9a-f]{64}$")
    folder: str | None
    table: str | None
    split_column: str | None
    splits: dict[Name, SplitParams] | None
    hold_out: HoldOutParams | None
    rest: Name | None
    tasks: dict[Name, str] | None
    shard_size: Count

    @model_validator(mode="after")
    def _splits_are_named_or_drawn(self) -> "PicturesDataset":
        named, drawn = self.splits is not None, self.hold_out is not None
        if named == drawn or (self.rest is not None) != drawn:
            raise ValueError("expected either `splits`, or `hold_out` with `rest`; set what is not used to null")
        if self.hold_out is not None and self.hold_out.split == self.rest:
            raise ValueError(f"hold_out.split and rest: expected two names, got {self.rest!r} twice")
        if self.table is None and self.split_column is not None:
            raise ValueError(f"split_column: expected null where `table` is null, got {self.split_column!r}")
        if self.table is not None and named and self.split_column is None:
            raise ValueError("split_column: expected the table's column that `splits` refers to, got null")
        if self.table is None and self.tasks is not None and set(self.tasks.values()) != {"folder"}:
            raise ValueError(f"tasks: expected `NAME: folder` where `table` is null, got {self.tasks}")
        return self

    @property
    def path(self) -> Path:
        return expand_path(self.source)

    def split_names(self) -> tuple[str, ...]:
        if self.splits is not None:
            return tuple(self.splits)
        assert self.hold_out is not None
        assert self.rest is not None
        return (self.rest, self.hold_out.split)


Dataset = ScenesDataset | PicturesDataset
DATASET_KINDS: dict[str, type[Dataset]] = {"scenes": ScenesDataset, "pictures": PicturesDataset}


class BackboneParams(Section):
    """One entry of section `backbones`; see `tve.backbones.load_backbone` for what the values mean.

    `weights` is "train" (the backbone stage trains it), "timm", "random", or a file. `removal` is the
    operator that this backbone's explainer is trained for.
    """

    architecture: str
    weights: str
    sha256: str | None = Field(pattern=r"^[0-9a-f]{64}$")
    timm_args: dict[str, Any]
    preprocessing: dict[str, Any]
    patches_per_side: Count | None
    removal: Removal

    @field_validator("weights")
    @classmethod
    def _expanded(cls, weights: str) -> str:
        return weights if weights in ("train", "timm", "random") else str(expand_path(weights))


def expand_path(path: str) -> Path:
    """A path with $TVE_DATA replaced by that environment variable, or by its default."""
    return Path(path.replace("$TVE_DATA", os.environ.get("TVE_DATA") or DEFAULT_DATA_FOLDER))


def load_params(path: Path = PARAMS_FILE) -> dict[str, Any]:
    """The whole file, unchecked.

    Raises:
        ValueError: not a YAML mapping.
        FileNotFoundError: no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"expected {path} in {Path.cwd()}; run from the root of the repository")
    try:
        document = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: expected YAML: {error}") from error
    if not isinstance(document, dict):
        raise ValueError(f"{path}: expected a mapping of sections, got {type(document).__name__}")
    return document


def load_section(name: str, model: type[AnySection], path: Path = PARAMS_FILE) -> AnySection:
    """The section `name`, checked.

    Raises:
        ValueError: an unknown or missing key, or a value out of range, naming its full path.
    """
    return parse(_entry(load_params(path), name, "sections", str(path)), model, where=name, source=str(path))


def active_profile(path: Path = PARAMS_FILE) -> str:
    """The name of the profile that params.yaml points to; every output lies below it.

    Raises:
        ValueError: no name, or one that is no plain word.
    """
    name = _entry(load_params(path), "profile", "sections", str(path))
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError(f"{path}: profile: expected letters, digits and underscores, got {name!r}")
    return name


def load_dataset(name: str, path: Path = PARAMS_FILE) -> Dataset:
    """The dataset `name` of section `datasets`.

    Raises:
        ValueError: no such dataset, or a wrong key in it.
    """
    entries = _mapping(_entry(load_params(path), "datasets", "sections", str(path)), "datasets", path)
    where = f"datasets.{name}"
    entry = _mapping(_entry(entries, name, "datasets", f"{path}: datasets"), where, path)
    kind = _entry(entry, "kind", "keys", f"{path}: {where}")
    if kind not in DATASET_KINDS:
        raise ValueError(f"{path}: {where}.kind: expected one of {sorted(DATASET_KINDS)}, got {kind!r}")
    return parse(entry, DATASET_KINDS[kind], where=where, source=str(path))


def load_backbone_params(name: str, path: Path = PARAMS_FILE) -> BackboneParams:
    """The backbone `name` of section `backbones`.

    Raises:
        ValueError: no such backbone, or a wrong key in it.
    """
    entries = _mapping(_entry(load_params(path), "backbones", "sections", str(path)), "backbones", path)
    entry = _entry(entries, name, "backbones", f"{path}: backbones")
    return parse(entry, BackboneParams, where=f"backbones.{name}", source=str(path))


def parse(values: object, model: type[AnySection], where: str, source: str) -> AnySection:
    """`values` as a `model`; errors name keys as `where.key`, in `source`.

    Raises:
        ValueError: one line for each wrong key, with the known ones.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        problems = [_problem(details, model, where) for details in error.errors()]
        raise ValueError(f"{source}: " + "\n".join(problems)) from error


def _entry(entries: Mapping[str, Any], name: str, what: str, where: str) -> Any:
    if name not in entries:
        raise ValueError(f"{where}: no {name!r}; known {what}: {', '.join(map(str, entries))}")
    return entries[name]


def _mapping(values: object, where: str, path: Path) -> Mapping[str, Any]:
    if not isinstance(values, dict):
        raise ValueError(f"{path}: {where}: expected a mapping, got {type(values).__name__}")
    return values


def _problem(details: Mapping[str, Any], model: type[BaseModel], where: str) -> str:
    location: tuple[int | str, ...] = details["loc"]
    path = ".".join((where, *map(str, location)))
    if details["type"] in ("extra_forbidden", "missing"):
        state = "unknown key" if details["type"] == "extra_forbidden" else "missing key"
        return f"{path}: {state}; known keys: {', '.join(_known_keys(model, location[:-1]))}"
    message = str(details["msg"]).removeprefix("Value error, ")
    return f"{path}: {message}" + ("" if details["type"] == "value_error" else f", got {details['input']!r}")


def _known_keys(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """The keys of the model that lies at `location` inside `model`."""
    annotation: Any = model
    for part in location:
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            annotation = annotation.model_fields[str(part)].annotation
        else:  # an entry of a mapping or of a sequence
            inner = get_args(annotation)
            annotation = inner[1] if get_origin(annotation) is dict else inner[0]
        if get_origin(annotation) in (Union, UnionType):
            annotation = next(choice for choice in get_args(annotation) if choice is not NoneType)
    assert issubclass(annotation, BaseModel)
    return list(annotation.model_fields)
