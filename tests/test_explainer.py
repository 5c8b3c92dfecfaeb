"""The explainer: its starting point, its forms, its training, its export."""

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from tve.backbones import Backbone, load_backbone
from tve.evaluator import CoalitionEvaluator
from tve.explainer import Explainer, ExplainerConfig
from tve.export import load_explainer, save_explainer
from tve.meta_attribution import exact_windows
from tve.optimisation import NonFiniteLossError
from tve.pictures import PictureBatch
from tve.training import TrainingConfig, TrainingResult, predict, pretrain
from tve.two_networks import TwoNetworksConfig

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
SMALL_PAPER = TwoNetworksConfig(
    embed_dim=32, encoder_depth=1, decoder_depth=1, num_heads=2, mixing_layers=2, differences=True
)
FORMS = [{"trunk": "frozen"}, {"trunk": "trained"}, {"trunk": "trained", "trained_blocks": 1}, {"form": "two_networks"}]


@pytest.fixture
def backbone() -> Backbone:
    torch.manual_seed(0)
    return load_backbone("vit_tiny_patch16_224", "random", timm_args=VIT)


def explainer_for(backbone: Backbone, **settings: object) -> Explainer:
    torch.manual_seed(1)
    base = {"radius": 1, "removal": "drop", "num_levels": 2, "width": 16, "depth": 1, "two_networks": SMALL_PAPER}
    return Explainer(backbone, ExplainerConfig(**(base | settings)))  # type: ignore[arg-type]


@pytest.mark.parametrize("settings", FORMS)
def test_an_untrained_explainer_gives_the_two_trivial_answers(backbone: Backbone, settings: dict[str, object]) -> None:
    images = torch.randn(2, 3, 32, 32)
    meta = explainer_for(backbone, **settings)(images)
    full = backbone(images)
    assert torch.allclose(meta.removed_BND, full[:, None].expand(-1, 16, -1), atol=1e-5)
    assert torch.equal(meta.kept_BND, torch.zeros_like(meta.kept_BND))


@pytest.mark.parametrize(
    ("architecture", "timm_args"),
    [
        ("deit_tiny_distilled_patch16_224", {"img_size": 64}),
        ("swin_tiny_patch4_window7_224", {"img_size": 64, "window_size": 2, "depths": (1, 1, 1, 1)}),
        ("convnext_atto", {}),
        ("resnet18", {}),
    ],
)
def test_every_kind_of_backbone_gets_an_explainer_on_its_patch_grid(
    architecture: str, timm_args: dict[str, object]
) -> None:
    backbone = load_backbone(architecture, "random", timm_args=timm_args)
    size, patches = backbone.image_size, backbone.patches_per_side
    meta = explainer_for(backbone, removal="zero")(torch.randn(1, 3, size, size))
    assert meta.kept_BND.shape == meta.removed_BND.shape == (1, patches**2, backbone.embed_dim)


def test_explain_gives_the_map_of_the_predicted_class(backbone: Backbone) -> None:
    explainer, head, images = explainer_for(backbone), nn.Linear(32, 7), torch.randn(3, 3, 32, 32)
    nn.init.normal_(explainer.network.to_kept.weight)  # type: ignore[union-attr,arg-type]
    predicted = head(backbone(images)).argmax(1)
    every = explainer.explain_all(images, head)
    expected = every[torch.arange(3), predicted]
    torch.testing.assert_close(explainer.explain(images, head), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(explainer.explain(images, head, target=2), every[:, 2], atol=1e-5, rtol=1e-5)


def test_a_class_the_head_lacks_and_a_head_of_another_width_are_refused(backbone: Backbone) -> None:
    explainer, images = explainer_for(backbone), torch.randn(1, 3, 32, 32)
    with pytest.raises(ValueError, match="expected 0 to 6, got"):
        explainer.explain(images, nn.Linear(32, 7), target=7)
    with pytest.raises(ValueError, match="width 32, got one that fails on them"):
        explainer.explain(images, nn.Linear(48, 7))
    with pytest.raises(ValueError, match=r"class: expected an int, or one per picture, \[1\], got float32"):
        explainer.explain(images, nn.Linear(32, 7), target=2.0)  # type: ignore[arg-type]


def test_one_class_per_picture_may_be_a_list(backbone: Backbone) -> None:
    explainer, head, images = explainer_for(backbone), nn.Linear(32, 7), torch.randn(3, 3, 32, 32)
    nn.init.normal_(explainer.network.to_kept.weight)  # type: ignore[union-attr,arg-type]
    every = explainer.explain_all(images, head)
    expected = every[torch.arange(3), torch.tensor([4, 0, 4])]
    assert torch.allclose(explainer.explain(images, head, [4, 0, 4]), expected)
    assert not torch.allclose(every[:, 4], expected)


def test_heatmaps_can_enter_a_computation_that_is_differentiated(backbone: Backbone) -> None:
    explainer, head, images = explainer_for(backbone), nn.Linear(32, 7), torch.randn(1, 3, 32, 32)
    weight = torch.ones(4, 4, requires_grad=True)
    exact = exact_windows(CoalitionEvaluator(backbone, "drop"), images, explainer.family)
    for result in (explainer.explain(images, head), explainer.explain_all(images, head), exact.kept_BND[..., :4]):
        assert not result.requires_grad
        (weight * result.reshape(-1, 4, 4)).sum().backward()
    assert weight.grad is not None


def test_what_the_explainer_predicts_knows_the_radius_of_its_windows(backbone: Backbone) -> None:
    explainer, images = explainer_for(backbone, radius=2), torch.randn(2, 3, 32, 32)
    exact = exact_windows(CoalitionEvaluator(backbone, "drop"), images, explainer.family)
    assert explainer(images).radius == exact.radius == predict(explainer, images, 1).radius == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"removal": "blur"}, "removal: expected one of .*, got 'blur'"),
        ({"radius": 1.5}, r"radius: expected a whole number \(int\), got 1\.5"),
        ({"radius": 4}, "radius: expected 0 to 3 on a 4 x 4 grid, got 4"),
        ({"form": "three"}, "form: expected one of .*, got 'three'"),
    ],
)
def test_a_configuration_that_does_not_exist_is_refused(
    backbone: Backbone, settings: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        explainer_for(backbone, **settings)


def batches_of(images: torch.Tensor, size: int, start_step: int) -> Iterator[PictureBatch]:
    for step in itertools.count(start_step):
        index = torch.randperm(len(images), generator=torch.Generator().manual_seed(step))[:size]
        yield PictureBatch(images[index], [f"{i:09d}" for i in index.tolist()])


def short_run(
    explainer: Explainer, images: torch.Tensor, checkpoint: Path, num_steps: int = 60, stop_after: int | None = None
) -> TrainingResult:
    config = TrainingConfig(
        num_steps=num_steps,
        centres_per_image=4,
        learning_rate=5e-3,
        trunk_learning_rate=1e-3,
        weight_decay=0.0,
        warmup_steps=5,
        evaluate_every=20,
        checkpoint_every=20,
        seed=0,
        precision="float32",
    )

    def batches(start_step: int) -> Iterator[PictureBatch]:
        steps = batches_of(images, 8, start_step)
        if stop_after is None:
            return steps
        return itertools.chain(itertools.islice(steps, stop_after - start_step), _killed())

    evaluator = CoalitionEvaluator(explainer.backbone, "drop")
    return pretrain(explainer, evaluator, batches, images[:8], config, checkpoint=checkpoint, identity="test")


def _killed() -> Iterator[PictureBatch]:
    raise KeyboardInterrupt
    yield


@pytest.mark.parametrize("settings", FORMS)
def test_pretraining_beats_the_trivial_answers(backbone: Backbone, settings: dict[str, object], tmp_path: Path) -> None:
    images = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    result = short_run(explainer_for(backbone, **settings), images, tmp_path / "c.pt")
    assert result.explained.kept > result.trivial.kept
    assert result.explained.removed > result.trivial.removed


def test_the_error_of_maps_and_its_bounds_are_measured_on_the_way_and_fall(backbone: Backbone, tmp_path: Path) -> None:
    images = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    result = short_run(explainer_for(backbone), images, tmp_path / "c.pt")
    measured = [row for row in result.rows if row.get("explanation_error") is not None]
    assert [row["step"] for row in measured] == [20, 40, 60]
    for row in measured:
        error, bound, from_loss = (row[name] for name in ("explanation_error", "explanation_bound", "loss_bound"))
        assert 0 < error <= bound <= from_loss  # type: ignore[operator]
        assert row["bound_over_error"] >= 1  # type: ignore[operator]
    for name in ("explanation_error", "explanation_bound", "loss_bound"):
        assert measured[-1][name] < measured[0][name]  # type: ignore[operator]


def test_a_backbone_without_a_classifier_is_pretrained_without_them(tmp_path: Path) -> None:
    headless = load_backbone("vit_tiny_patch16_224", "random", timm_args=VIT | {"num_classes": 0})
    result = short_run(explainer_for(headless), torch.randn(16, 3, 32, 32), tmp_path / "c.pt", num_steps=20)
    assert result.rows[-1]["r2_kept"] is not None
    assert "explanation_error" not in result.rows[-1]


def test_a_run_cut_short_resumes_to_the_same_weights(backbone: Backbone, tmp_path: Path) -> None:
    images = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    whole, cut = explainer_for(backbone), explainer_for(backbone)
    short_run(whole, images, tmp_path / "whole.pt")
    with pytest.raises(KeyboardInterrupt):
        short_run(cut, images, tmp_path / "cut.pt", stop_after=30)
    resumed = explainer_for(backbone)
    result = short_run(resumed, images, tmp_path / "cut.pt")
    assert result.resumed_from_step == 20
    assert not (tmp_path / "cut.pt").exists()
    for name, tensor in whole.trained_state().items():
        assert torch.equal(tensor, resumed.trained_state()[name]), name


def test_a_checkpoint_of_another_configuration_is_not_resumed(backbone: Backbone, tmp_path: Path) -> None:
    images = torch.randn(16, 3, 32, 32)
    with pytest.raises(KeyboardInterrupt):
        short_run(explainer_for(backbone), images, tmp_path / "c.pt", stop_after=30)
    result = short_run(explainer_for(backbone), images, tmp_path / "c.pt", num_steps=40)
    assert result.resumed_from_step == 0


def test_a_loss_that_is_not_finite_names_step_and_pictures(backbone: Backbone, tmp_path: Path) -> None:
    explainer = explainer_for(backbone)
    nn.init.constant_(explainer.network.to_kept.weight, float("nan"))  # type: ignore[union-attr,arg-type]
    with pytest.raises(NonFiniteLossError, match=r"step 0: .* pictures 0000"):
        short_run(explainer, torch.randn(16, 3, 32, 32), tmp_path / "c.pt")


def test_an_export_explains_as_the_explainer_did_and_is_the_same_bytes(backbone: Backbone, tmp_path: Path) -> None:
    explainer, images = explainer_for(backbone).eval(), torch.randn(2, 3, 32, 32)
    nn.init.normal_(explainer.network.to_removed.weight)  # type: ignore[union-attr,arg-type]
    for folder in ("a", "b"):
        save_explainer(explainer, tmp_path / folder, {"r2_kept": 0.5})
    head = nn.Linear(32, 3)
    assert torch.equal(load_explainer(tmp_path / "a").explain(images, head), explainer.explain(images, head))
    for file in ("explainer.safetensors", "config.json", "README.md", "backbone/model.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.json", b"{"),
        ("config.json", b"[]"),
        ("config.json", b'{"format": 1}'),
        ("config.json", b"\xff\xfe"),
        ("explainer.safetensors", b"no tensors"),
        ("backbone/backbone.json", b'{"name": "vit"}'),
        ("backbone/backbone.json", b""),
        ("backbone/model.safetensors", b""),
    ],
)
def test_a_damaged_export_is_refused_by_the_name_of_the_file(
    backbone: Backbone, tmp_path: Path, file: str, content: bytes
) -> None:
    save_explainer(explainer_for(backbone), str(tmp_path))
    (tmp_path / file).write_bytes(content)
    with pytest.raises(ValueError, match=f"{file}: not an export, or damaged; export again"):
        load_explainer(str(tmp_path))


def test_an_export_with_an_unknown_setting_is_refused(backbone: Backbone, tmp_path: Path) -> None:
    save_explainer(explainer_for(backbone), tmp_path)
    text = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(text.replace('"num_levels"', '"levels"'))
    with pytest.raises(ValueError, match=r"config\.json: not an export, or damaged; export again .*levels"):
        load_explainer(tmp_path)


def test_a_folder_without_an_export_is_said_to_be_one(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"expected an exported explainer with config\.json, got"):
        load_explainer(tmp_path)


def test_a_state_of_another_configuration_is_refused_in_one_line(backbone: Backbone) -> None:
    wide, narrow = explainer_for(backbone, width=24), explainer_for(backbone)
    with pytest.raises(ValueError, match=r"does not fit this configuration: \d+ tensors differ, first \S+ \[.*24") as e:
        narrow.load_trained_state(wide.trained_state())
    assert len(str(e.value)) < 200


def test_an_export_does_not_serve_another_backbone(backbone: Backbone, tmp_path: Path) -> None:
    save_explainer(explainer_for(backbone), tmp_path)
    torch.manual_seed(9)
    other = load_backbone("vit_tiny_patch16_224", "random", timm_args=VIT)
    with pytest.raises(ValueError, match="serves the backbone that it was pre-trained for"):
        load_explainer(tmp_path, other)


def test_batches_do_not_change_a_prediction(backbone: Backbone) -> None:
    explainer, images = explainer_for(backbone).eval(), torch.randn(5, 3, 32, 32)
    one, two = predict(explainer, images, 5), predict(explainer, images, 2)
    assert torch.allclose(one.removed_BND, two.removed_BND, atol=1e-5)
    exact = exact_windows(CoalitionEvaluator(backbone, "drop"), images, explainer.family)
    assert exact.kept_BND.shape == one.kept_BND.shape
