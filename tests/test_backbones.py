import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from tve.backbones import Backbone, load_backbone, open_backbone, save_backbone
from tve.coalitions import Windows
from tve.digests import file_sha256
from tve.evaluator import CoalitionEvaluator
from tve.meta_attribution import exact_windows
from tve.removal import zero_pixels
from tve.weights import state_digest

VIT = "vit_tiny_patch16_224"
SMALL_VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 5}
# Architecture, arguments, patches per side, width of the embedding, grids of its levels: tiny, with random weights.
FAMILIES: dict[str, tuple[str, dict[str, Any], int, int]] = {
    "ViT": (VIT, SMALL_VIT, 4, 32),
    "DeiT": ("deit_tiny_patch16_224", SMALL_VIT, 4, 32),
    "Swin": (
        "swin_tiny_patch4_window7_224",
        {"img_size": 64, "window_size": 2, "embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2]},
        4,
        64,
    ),
    "ConvNeXt": (
        "convnext_atto",
        {"dims": [8, 8, 16, 24], "depths": [1, 1, 1, 1], "pretrained_cfg_overlay": {"input_size": [3, 64, 64]}},
        4,
        24,
    ),
    "ResNet": ("resnet18", {"channels": [8, 8, 16, 24], "pretrained_cfg_overlay": {"input_size": [3, 64, 64]}}, 4, 24),
}


def backbone(family: str = "ViT") -> Backbone:
    torch.manual_seed(0)
    architecture, arguments, _, _ = FAMILIES[family]
    return load_backbone(architecture, "random", name=family, timm_args=arguments)


def pictures(made: Backbone, count: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 3, made.image_size, made.image_size, generator=generator)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_serves_the_operator_zero(family: str) -> None:
    made = backbone(family)
    _, _, patches, width = FAMILIES[family]
    assert (made.patches_per_side, made.embed_dim) == (patches, width)
    images = pictures(made)
    present = torch.rand(2, 3, patches, patches, generator=torch.Generator().manual_seed(2)) < 0.5
    present[:, 2] = True
    embeddings = CoalitionEvaluator(made, "zero")(images, present)
    assert embeddings.shape == (2, 3, width)
    for coalition in range(3):
        masked = zero_pixels(images, present[:, coalition])
        torch.testing.assert_close(embeddings[:, coalition], made(masked), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(embeddings[:, 2], made(images), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(embeddings[:, 0], embeddings[:, 2], atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_features_are_maps_on_the_patch_grid_and_the_embedding(family: str) -> None:
    made = backbone(family)
    images = pictures(made)
    features = made.features(images, num_levels=2)
    torch.testing.assert_close(features.embedding_BD, made(images), atol=1e-5, rtol=1e-5)
    assert len(features.levels) == 2
    assert {tuple(level.shape[2:]) for level in features.levels} == {(made.patches_per_side,) * 2}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_classifier_reads_the_embedding(family: str) -> None:
    made = backbone(family)
    head = made.classifier()
    assert head is not None
    images = pictures(made)
    torch.testing.assert_close(head(made(images)), made.model(images), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_backbone_opens_the_same_and_saves_to_the_same_bytes(family: str, tmp_path: Path) -> None:
    made = backbone(family)
    save_backbone(made, tmp_path / "a")
    opened = open_backbone(tmp_path / "a")
    save_backbone(opened, tmp_path / "b")
    assert opened.weights_sha256 == made.weights_sha256
    assert opened.config.preprocessing == made.config.preprocessing
    assert torch.equal(opened(pictures(made)), made(pictures(made)))
    for file in ("model.safetensors", "backbone.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_a_backbone_whose_weights_were_altered_does_not_open(tmp_path: Path) -> None:
    save_backbone(backbone(), tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state["cls_token"][0, 0, 0] += 1e-3
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors: expected weights [0-9a-f]{64}, got [0-9a-f]{64}"):
        open_backbone(tmp_path)


def test_a_backbone_is_frozen_and_stays_in_evaluation_mode() -> None:
    made = backbone("ResNet").train()
    assert not made.training
    assert not any(module.training for module in made.modules())
    assert not any(parameter.requires_grad for parameter in made.parameters())


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_weights_come_from_a_file_whose_digest_is_pinned(suffix: str, tmp_path: Path) -> None:
    made, path = backbone(), tmp_path / f"weights{suffix}"
    state = {key: tensor.half() for key, tensor in made.model.state_dict().items()}
    if suffix == ".pth":
        torch.save({"state_dict": state}, path)
    else:
        save_file(state, path)
    opened = load_backbone(VIT, path, timm_args=SMALL_VIT, sha256=file_sha256(path))
    torch.testing.assert_close(opened(pictures(made)), made(pictures(made)), atol=1e-2, rtol=1e-2)
    assert next(opened.parameters()).dtype == torch.float32
    with pytest.raises(ValueError, match=r"expected sha256 0000.*the file is not the one that was pinned"):
        load_backbone(VIT, path, timm_args=SMALL_VIT, sha256="0" * 64)


def test_weights_of_another_picture_size_have_their_positions_interpolated(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file(backbone().model.state_dict(), path)
    larger = load_backbone(VIT, path, timm_args=SMALL_VIT | {"img_size": 48})
    assert larger.patches_per_side == 6
    assert larger(pictures(larger)).shape == (2, 32)


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file(backbone().model.state_dict(), path)
    for changes, count, first in (
        ({"depth": 2}, "12 tensors differ", r"blocks\.2\.attn\.proj\.bias \[32\] instead of none"),
        ({"depth": 4}, "12 tensors differ", r"blocks\.3\.norm1\.weight none instead of \[32\]"),
        ({"num_classes": 7}, "2 tensors differ", r"head\.weight \[5, 32\] instead of \[7, 32\]"),
        ({"embed_dim": 48}, r"\d+ tensors differ", r"cls_token \[1, 1, 32\] instead of \[1, 1, 48\]"),
        ({"embed_dim": 48, "img_size": 48}, r"\d+ tensors differ", r"cls_token \[1, 1, 32\] instead of \[1, 1, 48\]"),
    ):
        message = (
            rf"weights\.safetensors: does not fit {VIT}: {count}, first {first}; check architecture and timm_args$"
        )
        with pytest.raises(ValueError, match=message):
            load_backbone(VIT, str(path), timm_args=SMALL_VIT | changes)
    with pytest.raises(FileNotFoundError, match=r"expected a \.safetensors or \.pth file, got .*absent"):
        load_backbone(VIT, tmp_path / "absent.pth", timm_args=SMALL_VIT)
    for suffix in (".safetensors", ".pth"):
        broken = tmp_path / f"broken{suffix}"
        broken.write_bytes(b"no weights")
        with pytest.raises(ValueError, match=rf"broken\{suffix}: expected a \.safetensors or \.pth file of weights"):
            load_backbone(VIT, broken, timm_args=SMALL_VIT)
    torch.save({"epoch": 3, "net": {}}, tmp_path / "run.pth")
    with pytest.raises(ValueError, match=r"run\.pth: expected named tensors, .*got \['epoch', 'net'\]"):
        load_backbone(VIT, tmp_path / "run.pth", timm_args=SMALL_VIT)
    with pytest.raises(FileNotFoundError, match="which is a folder"):
        load_backbone(VIT, tmp_path, timm_args=SMALL_VIT)


def test_an_unknown_architecture_is_refused_with_similar_names() -> None:
    with pytest.raises(ValueError, match=r"got 'vit_tiny_patch16_225'; similar names: vit_tiny_patch16_224,"):
        load_backbone("vit_tiny_patch16_225", "random")
    with pytest.raises(ValueError, match=r"got 'resnet_18\.a1_in1k'; similar names: resnet18,"):
        load_backbone("resnet_18.a1_in1k", "random")
    with pytest.raises(ValueError, match=r"expected a timm model name, got 'swin_minute'; similar names: .*swin_"):
        load_backbone("swin_minute", "random")
    with pytest.raises(ValueError, match="expected a timm model name, got 'zzz'"):
        load_backbone("zzz", "random")


def test_an_unknown_argument_of_the_model_is_refused() -> None:
    refused = r"timm could not build vit_tiny_patch16_224\S* with timm_args .*: .*"
    for arguments, reason in (({"width_factor": 2}, "width_factor"), ({"num_heads": 5}, "divisible")):
        with pytest.raises(ValueError, match=refused + reason):
            load_backbone(VIT, "random", timm_args=arguments)
    with pytest.raises(ValueError, match=refused + "Invalid pretrained tag"):
        load_backbone(f"{VIT}.no_such_tag", "random")
    with pytest.raises(ValueError, match="expected square pictures, got 32 x 48"):
        load_backbone(VIT, "random", timm_args=SMALL_VIT | {"img_size": [32, 48]})


def test_a_grid_that_does_not_divide_the_picture_is_refused() -> None:
    for grid in (5, 0):
        with pytest.raises(ValueError, match=f"patches_per_side: expected a divisor of 32 pixels, got {grid}"):
            load_backbone(VIT, "random", timm_args=SMALL_VIT, patches_per_side=grid)


def test_drop_needs_a_plain_transformer_and_a_grid_that_divides_its_own() -> None:
    for family in ("Swin", "ConvNeXt", "ResNet"):
        with pytest.raises(ValueError, match=f"removal: expected 'zero' for {family}"):
            CoalitionEvaluator(backbone(family), "drop")
    fine = load_backbone(VIT, "random", timm_args=SMALL_VIT, patches_per_side=8)
    with pytest.raises(ValueError, match="a grid of 4 per side, which a grid of 8 does not divide"):
        CoalitionEvaluator(fine, "drop")


def test_a_hierarchical_model_has_features_only_on_the_grid_of_a_stage() -> None:
    architecture, arguments, _, _ = FAMILIES["Swin"]
    fine = load_backbone(architecture, "random", timm_args=arguments, patches_per_side=16)
    assert [level.shape[-1] for level in fine.features(pictures(fine), 2).levels] == [16, 16]
    assert fine.level_indices(4) == [0, 3]
    odd = load_backbone(architecture, "random", timm_args=arguments, patches_per_side=32)
    with pytest.raises(ValueError, match=r"expected a stage with a 32 x 32 grid, got stages of \[16, 8, 4, 2\]"):
        odd.features(pictures(odd), 2)


def test_a_hierarchical_model_adds_finer_stages_where_there_is_room_with_all_places_of_a_patch() -> None:
    made = backbone("Swin")  # stages of 16, 8, 4 and 2 places per side, 8, 16, 32 and 64 channels; a grid of 4
    expected = {1: [2, 3], 2: [2, 3], 3: [1, 2, 3], 4: [0, 1, 2, 3], 9: [0, 1, 2, 3]}
    assert {count: made.level_indices(count) for count in expected} == expected
    assert made.level_channels(4) == [8 * 16, 16 * 4, 32, 64]
    images = pictures(made)
    levels = made.features(images, 4).levels
    assert [level.shape[1] for level in levels] == made.level_channels(4)
    finest = made.model.forward_intermediates(images, indices=[0], output_fmt="NCHW", intermediates_only=True)[0]
    of_patch = levels[0][0, :, 1, 2].sort().values
    torch.testing.assert_close(of_patch, finest[0, :, 4:8, 8:12].flatten().sort().values)
    with pytest.raises(ValueError, match="num_levels: expected 1 or more for Swin, got 0"):
        made.level_indices(0)


def test_a_grid_coarser_than_the_patches_keeps_their_features() -> None:
    coarse = load_backbone(VIT, "random", timm_args=SMALL_VIT, patches_per_side=2)
    assert coarse.features(pictures(coarse), 1).levels[0].shape[1:] == (32 * 4, 2, 2)
    assert coarse.level_channels(1) == [32 * 4]


def test_a_plain_transformer_has_no_more_levels_than_blocks() -> None:
    made = backbone()
    assert [made.level_indices(count) for count in (1, 2, 3)] == [[2], [1, 2], [0, 1, 2]]
    for count in (0, 4):
        with pytest.raises(ValueError, match=f"num_levels: expected 1 to 3 for ViT, got {count}"):
            made.level_indices(count)


def test_pictures_are_normalised_as_the_backbone_was_trained() -> None:
    white = Image.fromarray(np.full((40, 50, 3), 255, np.uint8))
    assert backbone("ViT").preprocess(white).unique().tolist() == [1.0]  # mean and deviation 0.5
    deit = backbone("DeiT").preprocess(white)[:, 0, 0]
    expected = (1 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(deit, expected)
    own = load_backbone(VIT, "random", timm_args=SMALL_VIT, preprocessing={"mean": [0, 0, 0], "std": [1, 1, 1]})
    assert own.preprocess(white.convert("L")).unique().tolist() == [1.0]
    assert own.preprocess(white).shape == (3, 32, 32)


def test_preprocessing_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match=r"unknown \['crop'\]; known: \['crop_pct', 'interpolation', 'mean', 'std'\]"):
        load_backbone(VIT, "random", timm_args=SMALL_VIT, preprocessing={"crop": 1.0})
    for wrong in ({"mean": [0.5]}, {"std": [0, 1, 1]}):
        with pytest.raises(ValueError, match="expected mean and std of 3 channels, std positive"):
            load_backbone(VIT, "random", timm_args=SMALL_VIT, preprocessing=wrong)
    with pytest.raises(ValueError, match=r"interpolation: expected one of .*, got 'cubist'"):
        load_backbone(VIT, "random", timm_args=SMALL_VIT, preprocessing={"interpolation": "cubist"})


@pytest.mark.parametrize(
    ("architecture", "timm_args", "patches"),
    [
        ("inception_v3", {}, 13),  # 299 = 13 x 23 pixels, from 18: a tie
        ("resnet18", {"pretrained_cfg_overlay": {"input_size": [3, 200, 200]}}, 10),  # from 12
        ("resnet18", {}, 14),
    ],
)
def test_a_default_grid_always_divides_the_picture(architecture: str, timm_args: dict[str, Any], patches: int) -> None:
    made = load_backbone(architecture, "random", timm_args=timm_args)
    assert made.patches_per_side == patches


def test_a_grid_that_was_asked_for_is_never_another() -> None:
    with pytest.raises(ValueError, match="patches_per_side: expected a divisor of 32 pixels, got 5"):
        load_backbone(VIT, "random", timm_args=SMALL_VIT, patches_per_side=5)


def test_pixels_are_the_picture_as_the_model_saw_it() -> None:
    made = backbone()
    picture = np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype(np.uint8)
    whole = replace(made.config.preprocessing, crop_pct=1.0, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.1))
    made = Backbone(replace(made.config, preprocessing=whole), made.model)
    pixels = made.pixels(made.preprocess(Image.fromarray(picture)))
    assert pixels.dtype == np.uint8
    assert (pixels == picture).all()
    with pytest.raises(ValueError, match=r"image: expected one picture \[3, S, S\], got \[1, 3, 32, 32\]"):
        made.pixels(torch.zeros(1, 3, 32, 32))


@pytest.mark.parametrize("wrong", ["picture.jpg", np.zeros((32, 32, 3), np.uint8), Path("picture.jpg")])
def test_only_a_pil_image_is_preprocessed(wrong: Any) -> None:
    expected = f"image: expected a PIL image, got {type(wrong).__name__}; open it with PIL.Image.open"
    with pytest.raises(ValueError, match=expected):
        backbone().preprocess(wrong)


@pytest.mark.parametrize(
    ("images", "got"),
    [
        ([torch.zeros(3, 32, 32)], "got list"),
        (np.zeros((1, 3, 32, 32)), "got ndarray"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), r"got uint8 \[1, 3, 32, 32\]"),
        (torch.zeros(3, 3, 32, 32).index_fill(0, torch.tensor([2]), torch.nan), "got NaN or infinity in picture 2"),
        (torch.full((1, 3, 32, 32), torch.inf), "got NaN or infinity in picture 0"),
    ],
    ids=["list", "array", "bytes", "NaN", "infinity"],
)
def test_what_is_not_a_batch_of_normalised_pictures_is_refused_by_all_that_reads_pictures(
    images: Any, got: str
) -> None:
    made = backbone()
    evaluator = CoalitionEvaluator(made, "drop")
    readers: list[Callable[[], object]] = [
        lambda: made(images),
        lambda: made.features(images, 1),
        lambda: evaluator.full(images),
        lambda: evaluator(images, torch.ones(1, 1, 4, 4, dtype=torch.bool)),
        lambda: exact_windows(evaluator, images, Windows(4, 1)),
    ]
    for reader in readers:
        with pytest.raises(ValueError, match=rf"images: expected \[B, 3, 32, 32\] for ViT, floating and finite, {got}"):
            reader()


@pytest.mark.parametrize("shape", [(3, 32, 32), (2, 3, 32, 24), (2, 1, 32, 32)])
def test_pictures_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    for read in (backbone(), backbone().features):
        with pytest.raises(ValueError, match=r"images: expected \[B, 3, 32, 32\] for ViT, .*, got float32"):
            read(torch.zeros(shape), **({} if isinstance(read, Backbone) else {"num_levels": 1}))


def test_the_digest_depends_on_names_and_values_and_not_on_order() -> None:
    state = {"a": torch.arange(4.0), "b": torch.arange(4.0)}
    assert state_digest(state) == state_digest(dict(reversed(state.items())))
    others = (
        {"a": torch.arange(4.0), "c": torch.arange(4.0)},
        {"a": torch.arange(4.0), "b": torch.arange(4.0).reshape(2, 2)},
        {"a": torch.arange(4.0), "b": torch.arange(4.0) + 1e-6},
        {"a": torch.arange(4.0), "b": torch.arange(4.0).bfloat16()},
    )
    assert len({state_digest(other) for other in (state, *others)}) == 5


def test_the_configuration_that_is_written_is_all_that_is_read(tmp_path: Path) -> None:
    made = backbone()
    renamed = Backbone(replace(made.config, name="other"), made.model)
    save_backbone(renamed, tmp_path)
    document = json.loads((tmp_path / "backbone.json").read_text())
    assert document["weights_sha256"] == made.weights_sha256
    assert open_backbone(tmp_path).config.name == "other"
    assert timm.is_model(document["architecture"])
