"""The project's goals, measured: one JSON line each, and a non-zero exit where one falls short.

    python -m tve_pipeline.goals main [--skip-fresh-clone]

Nothing is read from a verdict that somebody wrote down. Outputs that take long to make are used only after their
bytes were hashed and found to be those of dvc.lock; statistics are computed from the per-picture scores, R² from the
export, the shards and the exact windows.
"""

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from numpy.typing import NDArray

from tve.evaluator import CoalitionEvaluator
from tve.export import load_explainer
from tve.fidelity.controls import CONTROLS
from tve.fidelity.statistics import paired_bootstrap, positive_density
from tve.heads import load_head
from tve.meta_attribution import exact_windows
from tve.objective import explained_variance
from tve.pictures import ordered_batches
from tve.shards import Shards
from tve.training import concatenated
from tve_pipeline.compare import read_cell
from tve_pipeline.evaluate_measures import object_patches
from tve_pipeline.goal_lines import Goals
from tve_pipeline.measure_names import FIDELITIES, SIGN_OF_BETTER
from tve_pipeline.params import RunParams, load_section
from tve_pipeline.recorded import verified_files
from tve_pipeline.scenes import SHAPES

PROFILE = "scenes"
NUM_R2_PICTURES = 128
NUM_DENSITY_PICTURES = 500


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=["main"])
    parser.add_argument("--skip-fresh-clone", action="store_true", help="leave out the run from nothing")
    arguments = parser.parse_args(argv)
    goals = Goals()
    fresh_clone(goals, skip=arguments.skip_fresh_clone)
    planted_patch(goals)
    verify_outputs(PROFILE)
    for backbone, dataset in cells(PROFILE):
        accuracy(goals, backbone)
        explained(goals, backbone)
        fidelity(goals, backbone, dataset)
        density(goals, backbone, dataset)
    real_cells(goals)
    return 1 if goals.fell_short else 0


def fresh_clone(goals: Goals, *, skip: bool) -> None:
    """`make repro`, `make test` and a second `make repro` in an empty folder, from the committed tree."""
    names = ("make repro, fresh clone", "make test, exit code", "make repro again", "stages run by make repro again")
    bars, units = (15.0, 0.0, 15.0, 0.0), ("min", "exit code", "s", "stages")
    values: list[float | None] = [None] * 4
    if not skip:
        root = Path(subprocess.check_output(["git", "rev-parse", "--show-toplevel"], text=True).strip())
        environment = {k: v for k, v in os.environ.items() if k not in ("VIRTUAL_ENV", "MAKEFLAGS", "MAKELEVEL")}
        environment["TVE_DATA"] = os.environ.get("TVE_DATA", str(root / "../shared/data"))
        with tempfile.TemporaryDirectory() as folder:
            clone = Path(folder, "tve")
            subprocess.run(["git", "clone", "--quiet", str(root), str(clone)], check=True)
            first, seconds, _ = _make("repro", clone, environment)
            values[0] = seconds / 60 if first == 0 else float("inf")
            values[1] = float(_make("test", clone, environment)[0])
            again, seconds, output = _make("repro", clone, environment)
            values[2] = seconds if again == 0 else float("inf")
            values[3] = float(len(re.findall(r"^Running stage", output, re.MULTILINE)))
    for name, value, bar, unit in zip(names, values, bars, units, strict=True):
        goals.at_most(name, value, bar, unit)


def planted_patch(goals: Goals) -> None:
    """The planted-patch tests, run here and now: every one must pass and none be skipped."""
    command = [sys.executable, "-m", "pytest", "-v", "tests/test_planted_patch.py"]
    output = subprocess.run(command, capture_output=True, text=True).stdout
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|error|skipped)", output)}
    passed = counts.pop("passed", 0)
    goals.at_least("planted patch tests passed", passed / max(1, passed + sum(counts.values())), 1.0, "share")


def accuracy(goals: Goals, backbone: str) -> None:
    """Test accuracy of the backbone's own head on scenes, measured on the test shards."""
    explainer = load_explainer(Path("models", PROFILE, "export", backbone))
    head = explainer.backbone.classifier()
    assert head is not None
    right = {"digit": 0, "shape": 0}
    num_pictures = 0
    shards = Shards.open(Path("data", PROFILE, "shards", "scenes"))
    for samples, images in ordered_batches(shards, "test", explainer.backbone, batch_size=200):
        with torch.inference_mode():
            joint = head(explainer.backbone(images)).argmax(1).tolist()
        for sample, predicted in zip(samples, joint, strict=True):
            assert sample.labels is not None
            right["digit"] += predicted // len(SHAPES) == sample.labels["digit"]
            right["shape"] += predicted % len(SHAPES) == sample.labels["shape"]
        num_pictures += len(samples)
    for task, bar in (("digit", 0.90), ("shape", 0.95)):
        goals.at_least(f"{backbone}: test accuracy, {task}", right[task] / num_pictures, bar, "share")


def explained(goals: Goals, backbone: str) -> None:
    """R² within a picture on held-out pictures, against exact windows evaluated here in float32."""
    explainer = load_explainer(Path("models", PROFILE, "export", backbone))
    evaluator = CoalitionEvaluator(explainer.backbone, explainer.config.removal)
    dataset = _params(PROFILE)["run"]["pretrain_dataset"]
    shards = Shards.open(Path("data", PROFILE, "shards", dataset))
    predicted, exact = [], []
    for _, images in ordered_batches(shards, "pretrain_val", explainer.backbone, batch_size=16, limit=NUM_R2_PICTURES):
        with torch.inference_mode():
            predicted.append(explainer(images))
        exact.append(exact_windows(evaluator, images, explainer.family, explainer.empty_D))
    learned = explained_variance(concatenated(predicted), concatenated(exact))
    goals.at_least(f"{backbone}: R² within a picture, ĝ", learned.kept, 0.45, "R²")
    goals.at_least(f"{backbone}: R² within a picture, ĥ", learned.removed, 0.65, "R²")


def fidelity(goals: Goals, backbone: str, dataset: str) -> None:
    """TVE against each control, and its share of the way from random to exact windows, from per-picture scores."""
    explainer_removal = json.loads(Path("models", PROFILE, "export", backbone, "config.json").read_text())
    removal = explainer_removal["explainer"]["removal"]
    for task, methods in scores(backbone, dataset, removal).items():
        for side in FIDELITIES:
            sign = SIGN_OF_BETTER[side]
            for control in CONTROLS:
                difference_N = sign * (methods["tve"][side] - methods[control][side])
                low = paired_bootstrap(difference_N[:, None], num_resamples=10_000, seed=0)[0].low
                goals.at_least(f"{task}: {side} of TVE better than {control}, lower end of 95 %", low, 1e-9, "p")
            random, tve, exact = (methods[name][side].mean() for name in ("random", "tve", "exact_windows"))
            bar = 0.80 if side == "fidelity_plus" else 0.70
            share = float((tve - random) / (exact - random))
            goals.at_least(f"{task}: {side}, share of the way from random to exact windows", share, bar, "share")


def density(goals: Goals, backbone: str, dataset: str) -> None:
    """Positive attribution per object patch: in the object that the task is about, over that in the other."""
    explainer = load_explainer(Path("models", PROFILE, "export", backbone))
    shards = Shards.open(Path("data", PROFILE, "shards", dataset))
    heads = Path("models", PROFILE, "heads", f"{backbone}-{dataset}")
    objects = {"digit": "shape", "shape": "digit"}
    sums: dict[tuple[str, str], float] = defaultdict(float)
    for samples, images in ordered_batches(
        shards, "test", explainer.backbone, batch_size=100, limit=NUM_DENSITY_PICTURES
    ):
        patches_BOPP = torch.stack(
            [object_patches(sample, len(shards.mask_objects), explainer.backbone) for sample in samples]
        )
        present = dict(zip(shards.mask_objects, patches_BOPP.unbind(1), strict=True))
        for task in objects:
            maps = explainer.explain(images, load_head(heads / f"{task}.safetensors"))
            for name in objects:
                sums[task, name] += float(positive_density(maps, present[name]).sum())
    for task, other in objects.items():
        ratio = sums[task, task] / sums[task, other]
        goals.at_least(f"{task}: density in the right object over the other", ratio, 2.0, "ratio")


def real_cells(goals: Goals) -> None:
    """How many of the real pictures' six cells (backbone, task) are on record as rows that hash as recorded."""
    done: set[tuple[str, str]] = set()
    for digests in sorted(Path("docs", "records").glob("real*/*/digests.json")):
        for name in verified_files(digests.parent):
            if name.startswith("scores"):
                done.add((digests.parent.name, name.removeprefix("scores-").split(".")[0].split("-")[0]))
    goals.at_least("real pictures: cells (backbone, task) on record", float(len(done)), 6.0, "cells")


def scores(backbone: str, dataset: str, removal: str) -> dict[str, dict[str, dict[str, NDArray[np.float64]]]]:
    """task -> map -> side -> one value a picture, pictures in the same order for every map."""
    cell = read_cell(
        Path("results", PROFILE, "evaluate", f"{backbone}-{dataset}"), ("tve", "exact_windows", "controls")
    )
    assert cell is not None
    return {
        task: {
            name: {side: cell.scores[task, name][f"{removal}_{side}"] for side in FIDELITIES}
            for name in cell.maps(task)
        }
        for task in cell.tasks
    }


def cells(profile: str) -> list[tuple[str, str]]:
    """The (backbone, task dataset) pairs of a profile."""
    run = _params(profile)["run"]
    return [(backbone, dataset) for backbone in run["backbones"] for dataset in run["task_datasets"]]


def methods_of(profile: str, backbone: str) -> tuple[str, ...]:
    """What is evaluated of a backbone of a profile."""
    return load_section("run", RunParams, _file(profile)).methods_of(backbone)


def section_of(profile: str, name: str) -> dict[str, Any]:
    """A section of a profile, unchecked."""
    section: dict[str, Any] = _params(profile)[name]
    return section


def verify_outputs(profile: str) -> None:
    """Hashes every output of the profile's stages from its bytes; anything but what dvc.lock names ends the run."""
    stages = yaml.safe_load(Path("dvc.lock").read_text())["stages"]
    for stage, entry in stages.items():
        if stage.split("@")[-1].split("-")[0] != profile:
            continue
        for out in entry.get("outs", []):
            path = Path(out["path"])
            actual = _dvc_md5(path) if path.exists() else "nothing"
            if actual != out["md5"]:
                raise SystemExit(
                    f"{path}: expected {out['md5']} (dvc.lock, {stage}), got {actual}; run `make repro` first, or "
                    "`tve lineage unused --delete` where dvc.yaml no longer has that stage"
                )


def _dvc_md5(path: Path) -> str:
    """The hash that DVC gives a file, or a folder as the sorted list of its files."""
    if path.is_file():
        return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
    files = sorted(file for file in path.rglob("*") if file.is_file())
    entries = [{"md5": _dvc_md5(file), "relpath": file.relative_to(path).as_posix()} for file in files]
    entries.sort(key=lambda entry: entry["relpath"])
    listing = json.dumps(entries, sort_keys=True).encode()
    return hashlib.md5(listing, usedforsecurity=False).hexdigest() + ".dir"


def _make(target: str, folder: Path, environment: dict[str, str]) -> tuple[int, float, str]:
    started = time.perf_counter()
    done = subprocess.run(
        ["make", target], cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode != 0:
        print(done.stdout[-4000:], file=sys.stderr)
    return done.returncode, time.perf_counter() - started, done.stdout


def _params(profile: str) -> Any:
    return yaml.safe_load(_file(profile).read_text())


def _file(profile: str) -> Path:
    return Path("profiles", f"{profile}.yaml")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
