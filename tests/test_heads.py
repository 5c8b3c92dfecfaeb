import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from tve.backbones import Backbone, load_backbone
from tve.evaluator import CoalitionEvaluator
from tve.heads import accuracy, embed_pictures, fit_linear_head, load_head, save_head
from tve.pictures import ordered_batches
from tve.samples import Sample
from tve.shards import Shards, write_shards
from tve_pipeline.heads import HeadsParams, fit_heads

PARAMS = HeadsParams(skip_tasks=(), max_train=None, regularization=1.0, max_iter=200)


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    torch.manual_seed(0)
    size = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2, "num_classes": 3}
    return load_backbone("vit_tiny_patch16_224", "random", timm_args=size, preprocessing={"crop_pct": 1.0})


def picture(index: int, brightness: int) -> Sample:
    pixels = np.random.default_rng(index).integers(brightness, brightness + 60, (16, 16, 3)).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    labels = {"level": brightness // 90, "dark": int(brightness < 90)}
    return Sample(f"{index:04d}", file.getvalue(), "png", labels, None, f"{index}.png")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    folder = tmp_path_factory.mktemp("shards") / "levels"
    splits = [
        (split, [picture(first + i, 90 * (i % 3)) for i in range(count)])
        for split, first, count in (("train", 0, 30), ("test", 100, 12))
    ]
    tasks = {"level": ("low", "middle", "high"), "dark": ("no", "yes")}
    write_shards(folder, "levels", splits, tasks, (), shard_size=7, source={})
    return Shards.open(folder)


def clouds(num_classes: int = 3, num_each: int = 40) -> tuple[Tensor, Tensor]:
    """Overlapping clouds in 4 dimensions of very different scale and offset, and a fifth that never changes."""
    generator = torch.Generator().manual_seed(0)
    labels_M = torch.arange(num_classes).repeat(num_each)
    noise_MD = torch.randn(len(labels_M), 4, generator=generator)
    centre_CD = 1.5 * torch.randn(num_classes, 4, generator=generator)
    values_MD = (centre_CD[labels_M] + noise_MD) * torch.tensor([1e-3, 1.0, 1.0, 1e3]) + torch.tensor([5, 0, -3, 2e4])
    return torch.cat([values_MD, torch.full((len(labels_M), 1), 7.0)], dim=1), labels_M


@pytest.mark.parametrize("num_classes", [2, 3])
def test_the_fitted_layer_gives_the_probabilities_of_scikit_learn_on_standardised_embeddings(num_classes: int) -> None:
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    embeddings_MD, labels_M = clouds(num_classes)
    head = fit_linear_head(embeddings_MD, labels_M, num_classes, regularization=0.5)
    standardised = StandardScaler().fit_transform(embeddings_MD.double().numpy())
    expected = LogisticRegression(C=2.0, max_iter=1000).fit(standardised, labels_M.numpy()).predict_proba(standardised)
    assert head.weight.shape == (num_classes, 5)
    torch.testing.assert_close(head.double()(embeddings_MD.double()).softmax(1).numpy(), expected, atol=1e-3, rtol=0)


def test_more_regularization_makes_smaller_weights() -> None:
    embeddings_MD, labels_M = clouds()
    weak, strong = (fit_linear_head(embeddings_MD, labels_M, 3, regularization=value) for value in (0.1, 100.0))
    assert strong.weight[:, 1].norm() < 0.5 * weak.weight[:, 1].norm()


def test_a_dimension_that_never_changes_has_no_weight() -> None:
    embeddings_MD, labels_M = clouds()
    assert fit_linear_head(embeddings_MD, labels_M, 3).weight[:, 4].abs().max() == 0


def test_fitting_refuses_what_cannot_be_fitted() -> None:
    embeddings_MD, labels_M = clouds()
    with pytest.raises(ValueError, match=r"got none of \[3\]"):
        fit_linear_head(embeddings_MD, labels_M, 4)
    with pytest.raises(ValueError, match=r"expected 0 to 1, got \[2\]"):
        fit_linear_head(embeddings_MD, labels_M, 2)
    with pytest.raises(ValueError, match="expected finite numbers"):
        fit_linear_head(embeddings_MD.index_fill(0, torch.tensor([3]), torch.nan), labels_M, 3)
    with pytest.raises(ValueError, match=r"expected \[M, D\] and \[M\], got \[120, 5\] and \[119\]"):
        fit_linear_head(embeddings_MD, labels_M[1:], 3)
    with pytest.raises(ValueError, match="regularization: expected a positive number, got 0"):
        fit_linear_head(embeddings_MD, labels_M, 3, regularization=0)


def test_pictures_are_embedded_in_the_order_of_the_shards_with_their_labels(backbone: Backbone, shards: Shards) -> None:
    embedded = embed_pictures(backbone, shards, "train", batch_size=8)
    ((samples, images),) = ordered_batches(shards, "train", backbone, batch_size=30)
    torch.testing.assert_close(embedded.embeddings, backbone(images))
    assert embedded.keys == tuple(sample.key for sample in samples)
    assert embedded.labels_of("level").tolist() == [0, 1, 2] * 10
    assert embedded.labels_of("dark").tolist() == [1, 0, 0] * 10


def test_halves_are_the_same_in_every_call_and_keep_half_of_the_patches(backbone: Backbone, shards: Shards) -> None:
    evaluator = CoalitionEvaluator(backbone, "drop")
    first, again = (embed_pictures(backbone, shards, "test", batch_size=5, halved_by=evaluator) for _ in range(2))
    assert torch.equal(first.embeddings, again.embeddings)
    assert first.keys == embed_pictures(backbone, shards, "test").keys
    ((_, images),) = ordered_batches(shards, "test", backbone, batch_size=12)
    # 2 x 2 patches: six halves, of which each picture's embedding is one.
    indices = torch.combinations(torch.arange(4), 2)
    halves_KPP = torch.zeros(6, 4, dtype=torch.bool).scatter(1, indices, value=True).reshape(6, 2, 2)
    every_BKD = evaluator(images, halves_KPP.expand(12, 6, 2, 2))
    nearest = (first.embeddings[:, None] - every_BKD).abs().amax(-1).amin(1)
    assert nearest.max() < 1e-5


def test_a_limit_takes_the_first_pictures(backbone: Backbone, shards: Shards) -> None:
    some = embed_pictures(backbone, shards, "train", batch_size=4, limit=6)
    assert some.keys == embed_pictures(backbone, shards, "train").keys[:6]
    assert len(some.embeddings) == len(some.labels_of("level")) == 6


def test_an_unknown_task_is_refused_by_name(backbone: Backbone, shards: Shards) -> None:
    embedded = embed_pictures(backbone, shards, "test")
    with pytest.raises(ValueError, match=r"expected one of the pictures' tasks \(dark, level\), got 'colour'"):
        embedded.labels_of("colour")


def test_the_stage_fits_and_writes_a_head_for_every_task(backbone: Backbone, shards: Shards, tmp_path: Path) -> None:
    document = fit_heads(backbone, shards, PARAMS, "drop", tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"heads.json", "level.safetensors", "dark.safetensors"}
    assert document["backbone_sha256"] == backbone.weights_sha256
    test = embed_pictures(backbone, shards, "test")
    halves = embed_pictures(backbone, shards, "test", halved_by=CoalitionEvaluator(backbone, "drop"))
    for task, entry in document["tasks"].items():
        assert entry["classes"] == list(shards.tasks[task])
        head = load_head(tmp_path / entry["file"], embed_dim=16)
        assert accuracy(head, test.embeddings, test.labels_of(task)) == entry["test_accuracy"] > 0.9
        assert accuracy(head, halves.embeddings, halves.labels_of(task)) == entry["halves_accuracy"]
        assert (entry["num_train"], entry["num_test"]) == (30, 12)


def test_a_saved_head_opens_the_same_and_saves_to_the_same_bytes(tmp_path: Path) -> None:
    head = nn.Linear(6, 3)
    save_head(head, tmp_path / "a.safetensors")
    opened = load_head(tmp_path / "a.safetensors")
    save_head(opened, tmp_path / "b.safetensors")
    assert torch.equal(opened.weight, head.weight)
    assert torch.equal(opened.bias, head.bias)
    assert not opened.weight.requires_grad
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_a_given_head_may_lack_a_bias_and_be_of_half_precision(tmp_path: Path) -> None:
    path = tmp_path / "given.safetensors"
    save_file({"weight": torch.ones(3, 6, dtype=torch.float16)}, path)
    head = load_head(path, embed_dim=6)
    assert head.weight.dtype == torch.float32
    assert head(torch.ones(1, 6)).tolist() == [[6.0, 6.0, 6.0]]


def test_a_head_file_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "head.safetensors"
    save_file({"weight": torch.ones(3, 6), "bias": torch.ones(3)}, path)
    with pytest.raises(ValueError, match="expected a head on embeddings of width 192, got one of width 6"):
        load_head(path, embed_dim=192)
    save_file({"weight": torch.ones(3, 6), "bias": torch.ones(4)}, path)
    with pytest.raises(ValueError, match="expected a bias for each of 3 classes"):
        load_head(path)
    save_file({"fc.weight": torch.ones(3, 6)}, path)
    with pytest.raises(ValueError, match=r"expected a linear head.*got \{'fc.weight': \[3, 6\]\}"):
        load_head(path)
    path.write_bytes(b"no tensors")
    with pytest.raises(ValueError, match=r"expected a \.safetensors file"):
        load_head(path)
    with pytest.raises(FileNotFoundError, match="which does not exist"):
        load_head(tmp_path / "absent.safetensors")
    with pytest.raises(
        ValueError, match=r"expected a \.safetensors file, got .*, which is a folder; name a file in it"
    ):
        load_head(str(tmp_path))
