"""`params.yaml`, the one place for numbers: its loader, and the models of what several stages share.

Every key is known and required; an error names the full path of a wrong key and the keys that are known
there. Each stage's own section is a model in the stage's module. Only stage entry points read the file;
the library takes values.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from tve.removal import Removal

PARAMS_FILE = Path("params.yaml")
DATA_VARIABLE = "$TVE_DATA"
DEFAULT_DATA_FOLDER = "../shared/data"
READINGS = ("tve", "tve_hg", "tve_untrained")  # methods that read the explainer (`tve_pipeline.readings`)
VIT_SHAPLEY, TWO_NETWORKS = "vit_shapley", "tve_two_networks"  # methods that have a training stage of their own
# In file names, DVC's stage names and tar members these never need quoting.
NAME_PATTERN = r"^[A-Za-z0-9_]+$"
SHA256_PATTERN = r"^[0-9a-f]{64}$"
PATTERN_WORDS = {NAME_PATTERN: "letters, digits and underscores", SHA256_PATTERN: "64 lower-case hexadecimal digits"}
Name = Annotated[str, Field(pattern=NAME_PATTERN)]
Sha256 = Annotated[str, Field(pattern=SHA256_PATTERN)]
Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
# pydantic's error type -> what was expected; {} are the error's own bounds.
EXPECTED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text",
    "tuple_type": "a list",
    "list_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "invalid_key": "text as key",
    "literal_error": "{expected}",
    "greater_than": "more than {gt:g}",
    "greater_than_equal": "at least {ge:g}",
    "less_than": "less than {lt:g}",
    "less_than_equal": "at most {le:g}",
    "too_short": "{min_length} entries or more",
    "too_long": "{max_length} entries or fewer",
}


class Section(BaseModel):
    """A section of params.yaml: no unknown key, no missing key, no value of another type, never changed."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)

    @model_validator(mode="before")
    @classmethod
    def _lists_are_tuples(cls, values: object) -> object:
        """YAML knows lists alone, and a section that never changes holds tuples."""
        if not isinstance(values, dict):
            return values
        return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}


AnySection = TypeVar("AnySection", bound=BaseModel)


class RunParams(Section):
    """Section `run`: which of the profile's backbones and datasets the stage graph iterates over."""

    backbones: tuple[Name, ...] = Field(min_length=1)
    datasets: tuple[Name, ...] = Field(min_length=1)  # everything that `shards` makes
    pretrain_dataset: Name
    task_datasets: tuple[Name, ...] = Field(min_length=1)  # what `heads` and `evaluate` run on
    readings: tuple[Name, ...]  # what `evaluate_tve` runs: methods that read the explainer
    methods: tuple[Name, ...]  # what `evaluate` runs: those that do not, so that another explainer leaves theirs alone
    vit_shapley: tuple[Name, ...]  # backbones for which ViT-Shapley is trained
    two_networks: tuple[Name, ...]  # backbones for which the paper's form of the explainer is trained too
    backbone_reads: str  # a path that the backbone stage depends on

    def methods_of(self, backbone: str) -> tuple[str, ...]:
        """What is evaluated of a backbone: `readings`, `methods`, and those that have a training stage of their own."""
        trained = {VIT_SHAPLEY: self.vit_shapley, TWO_NETWORKS: self.two_networks}
        return (
            *self.readings,
            *self.methods,
            *(method for method, backbones in trained.items() if backbone in backbones),
        )


class WindowsParams(BaseModel):
    """What section `pretrain` says of windows, for stages that do not train."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)

    radius: int = Field(ge=0)


class ScenesDataset(Section):
    """Generated pictures (see scenes.py), `splits[split]` of them each."""

    kind: Literal["scenes"]
    seed: Seed
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
    sha256: Sha256 | None
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

    def split_names(self) -> tuple[str, ...]:
        if self.splits is not None:
            return tuple(self.splits)
        assert self.hold_out is not None
        assert self.rest is not None
        return (self.rest, self.hold_out.split)


Dataset = ScenesDataset | PicturesDataset
DATASET_KINDS: dict[str, type[Dataset]] = {"scenes": ScenesDataset, "pictures": PicturesDataset}


class PreprocessingParams(Section):
    """What differs from timm's own preprocessing of a model; what is left out does not."""

    mean: tuple[float, ...] | None = Field(None, min_length=3, max_length=3)
    std: tuple[Positive, ...] | None = Field(None, min_length=3, max_length=3)
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"] | None = None
    crop_pct: Annotated[float, Field(gt=0, le=1)] | None = None


class BackboneParams(Section):
    """One entry of section `backbones`; see `tve.backbones.load_backbone` for what the values mean.

    `weights` is "train" (the backbone stage trains it), "timm", "random", or a file. `removal` is the
    operator that this backbone's explainer is trained for.
    """

    architecture: str
    weights: str
    sha256: Sha256 | None
    timm_args: dict[str, Any]
    preprocessing: PreprocessingParams
    patches_per_side: Count | None
    removal: Removal


def expand_path(path: str) -> Path:
    """A path with $TVE_DATA replaced by that environment variable, or by its default."""
    return Path(path.replace(DATA_VARIABLE, os.environ.get("TVE_DATA") or DEFAULT_DATA_FOLDER))


def existing_path(path: str, what: str) -> Path:
    """The same, of a file or folder that is there.

    Raises:
        FileNotFoundError: there is none; names `what` was looked for.
    """
    expanded = expand_path(path)
    if expanded.exists():
        return expanded
    hint = ""
    if DATA_VARIABLE in path and not os.environ.get("TVE_DATA"):
        hint = f"; {DATA_VARIABLE} is not set, so {DEFAULT_DATA_FOLDER} stands for it: export TVE_DATA=/your/folder"
    raise FileNotFoundError(f"{what}: expected a file or a folder, got {expanded}, which does not exist{hint}")


def load_params(path: Path = PARAMS_FILE) -> dict[str, Any]:
    """The whole file, unchecked.

    Raises:
        ValueError: not a YAML mapping.
        FileNotFoundError: no such file.
    """
    if path.is_symlink() and not path.exists():
        raise FileNotFoundError(
            f"{path}: expected a link to a profile, got one to {path.readlink()}, which does not exist; "
            "run `make profile NAME=scenes`"
        )
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
    """The name of the profile whose values params.yaml holds; every output lies below it.

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
    entries = defined("datasets", path)
    where = f"datasets.{name}"
    entry = _mapping(_entry(entries, name, "datasets", f"{path}: datasets"), where, path)
    kind = _entry(entry, "kind", "keys", f"{path}: {where}")
    if not isinstance(kind, str) or kind not in DATASET_KINDS:
        raise ValueError(f"{path}: {where}.kind: expected one of {sorted(DATASET_KINDS)}, got {kind!r}")
    return parse(entry, DATASET_KINDS[kind], where=where, source=str(path))


def load_backbone_params(name: str, path: Path = PARAMS_FILE) -> BackboneParams:
    """The backbone `name` of section `backbones`.

    Raises:
        ValueError: no such backbone, or a wrong key in it.
    """
    return load_entry("backbones", name, BackboneParams, path)


def load_entry(section: str, name: str, model: type[AnySection], path: Path = PARAMS_FILE) -> AnySection:
    """The entry `name` of section `backbones` or `methods`, checked.

    Raises:
        ValueError: no such entry, or a wrong key in it.
    """
    entry = _entry(defined(section, path), name, section, f"{path}: {section}")
    return parse(entry, model, where=f"{section}.{name}", source=str(path))


def defined(section: str, path: Path = PARAMS_FILE) -> Mapping[str, Any]:
    """The entries of section `backbones`, `datasets` or `methods`, unchecked but for their names.

    Raises:
        ValueError: not a mapping of names.
    """
    entries = _mapping(_entry(load_params(path), section, "sections", str(path)), section, path)
    for name in entries:
        if not isinstance(name, str) or not re.match(NAME_PATTERN, name):
            raise ValueError(f"{path}: {section}: expected names of {PATTERN_WORDS[NAME_PATTERN]}, got {name!r}")
    return entries


def require_defined(section: str, name: str, path: Path = PARAMS_FILE) -> None:
    """Raises ValueError, listing the known names, unless section `backbones`, `datasets` or `methods` defines it."""
    _entry(defined(section, path), name, section, f"{path}: {section}")


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
        raise ValueError(f"{path}: {where}: expected a mapping, got {_as_yaml(values)}")
    return values


def _problem(details: Mapping[str, Any], model: type[BaseModel], where: str) -> str:
    location: tuple[int | str, ...] = details["loc"]
    if location and location[-1] == "[key]":  # pydantic's mark of what is wrong with the key itself
        location = location[:-1]
    path = ".".join((where, *map(str, location)))
    if details["type"] in ("extra_forbidden", "missing"):
        state = "unknown key" if details["type"] == "extra_forbidden" else "missing key"
        return f"{path}: {state}; known keys: {', '.join(_known_keys(model, location[:-1]))}"
    if details["type"] == "value_error":
        return f"{path}: {str(details['msg']).removeprefix('Value error, ')}"
    return f"{path}: expected {_expected(details)}, got {_as_yaml(details['input'])}{_quoting_hint(details)}"


def _expected(details: Mapping[str, Any]) -> str:
    context: Mapping[str, Any] = details.get("ctx", {})
    if details["type"] == "string_pattern_mismatch":
        return PATTERN_WORDS.get(context["pattern"], f"text that matches {context['pattern']}")
    return EXPECTED.get(details["type"], str(details["msg"])).format_map(context)


def _as_yaml(value: object) -> str:
    """A value as a reader of params.yaml knows it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return repr(list(value) if isinstance(value, tuple) else value)


def _quoting_hint(details: Mapping[str, Any]) -> str:
    """What to do about a number that YAML reads as text: it is quoted, or it is one like 1e-3, which wants a point."""
    value = details["input"]
    if details["type"] not in ("int_type", "float_type") or not isinstance(value, str):
        return ""
    try:
        number = float(value)
    except ValueError:
        return ""
    text = str(int(number)) if number.is_integer() else str(number)
    return f"; write {text if '.' in text else text.replace('e', '.0e')}"


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
