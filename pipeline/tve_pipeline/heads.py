"""Stage `heads`: a linear head for every task of a dataset, fitted on one backbone's embeddings.

    python -m tve_pipeline.heads BACKBONE DATASET

Beside each head's accuracy stands that on random halves of the test pictures, under the removal operator that the
explainer is trained for: a backbone that never saw partial pictures gives erratic targets.

Writes TASK.safetensors and heads.json to models/P/heads/BACKBONE-DATASET, and metrics.json to
results/P/heads/BACKBONE-DATASET.
"""

from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field

from tve.backbones import Backbone, open_backbone
from tve.digests import file_sha256
from tve.evaluator import CoalitionEvaluator
from tve.heads import EmbeddedPictures, accuracy, embed_pictures, fit_linear_head, save_head
from tve.removal import Removal
from tve.shards import Shards
from tve_pipeline.entry import run_stage
from tve_pipeline.outputs import whole_folder, write_json
from tve_pipeline.params import Count, Name, Section, active_profile, load_backbone_params, load_section

TRAIN_SPLIT = "train"
TEST_SPLIT = "test"


class HeadsParams(Section):
    """Section `heads` of params.yaml."""

    skip_tasks: tuple[Name, ...]  # labels that get no head, such as the one that the backbone was trained on
    max_train: Count | None  # the first so many training pictures, null for all
    regularization: Annotated[float, Field(gt=0)]
    max_iter: Count


def main(argv: list[str]) -> None:
    backbone_name, dataset = argv
    profile = active_profile()
    params = load_section("heads", HeadsParams)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shards = Shards.open(Path("data", profile, "shards", dataset))
    backbone = open_backbone(Path("models", profile, "backbone", backbone_name)).to(device)
    removal = load_backbone_params(backbone_name).removal
    cell = f"{backbone_name}-{dataset}"
    with whole_folder(Path("models", profile, "heads", cell)) as folder:
        document = fit_heads(backbone, shards, params, removal, folder)
    with whole_folder(Path("results", profile, "heads", cell)) as folder:
        numbers = ("test_accuracy", "halves_accuracy", "train_accuracy", "num_train", "num_test")
        write_json(
            folder / "metrics.json",
            {task: {name: entry[name] for name in numbers} for task, entry in document["tasks"].items()},
        )


def fit_heads(
    backbone: Backbone, shards: Shards, params: HeadsParams, removal: Removal, folder: Path
) -> dict[str, Any]:
    """Fits and writes the heads of all tasks of a dataset, and says what `heads.json` says.

    Raises:
        ValueError: a dataset without tasks, or with too few pictures for one of them.
    """
    if not shards.tasks:
        raise ValueError(f"heads: expected a dataset with tasks, got {shards.dataset}, whose pictures have no labels")
    train = embed_pictures(backbone, shards, TRAIN_SPLIT, limit=params.max_train)
    test = embed_pictures(backbone, shards, TEST_SPLIT)
    halves = embed_pictures(backbone, shards, TEST_SPLIT, halved_by=CoalitionEvaluator(backbone, removal))
    tasks = {
        task: _fit(task, classes, train, test, halves, params, folder / f"{task}.safetensors")
        for task, classes in shards.tasks.items()
        if task not in params.skip_tasks
    }
    document = {"backbone_sha256": backbone.weights_sha256, "tasks": tasks}
    write_json(folder / "heads.json", document)
    return document


def _fit(
    task: str,
    classes: tuple[str, ...],
    train: EmbeddedPictures,
    test: EmbeddedPictures,
    halves: EmbeddedPictures,
    params: HeadsParams,
    path: Path,
) -> dict[str, Any]:
    try:
        head = fit_linear_head(
            train.embeddings,
            train.labels_of(task),
            len(classes),
            regularization=params.regularization,
            max_iter=params.max_iter,
        )
    except ValueError as error:
        raise ValueError(f"head of {task}: {error}") from error
    save_head(head, path)
    entry = {
        "classes": list(classes),
        "test_accuracy": accuracy(head, test.embeddings, test.labels_of(task)),
        "halves_accuracy": accuracy(head, halves.embeddings, halves.labels_of(task)),
        "train_accuracy": accuracy(head, train.embeddings, train.labels_of(task)),
        "num_train": len(train.keys),
        "num_test": len(test.keys),
        "file": path.name,
        "sha256": file_sha256(path),
    }
    right = f"{entry['test_accuracy']:.3f} of {entry['num_test']} test pictures right"
    print(f"{task}: {right}, {entry['halves_accuracy']:.3f} on random halves")
    return entry


if __name__ == "__main__":
    run_stage("heads", main, "BACKBONE", "DATASET")
