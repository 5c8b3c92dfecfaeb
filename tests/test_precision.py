"""Which arithmetic passes run in, and that a fallback says why."""

import logging

import pytest
import torch

from tve import precision
from tve.backbones import load_backbone
from tve.evaluator import CoalitionEvaluator
from tve.precision import choose_precision, has_bfloat16

CPU = torch.device("cpu")


@pytest.mark.parametrize(("native", "expected"), [(True, "bfloat16"), (False, "float32")])
def test_auto_is_bfloat16_only_where_the_device_has_products_of_it(
    native: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "has_bfloat16", lambda device: native)
    choice = choose_precision("auto", CPU)
    assert choice.precision == expected
    assert ("has no products" in choice.reason) == (not native)


def test_what_is_asked_for_is_taken_and_a_slow_one_is_said_to_be(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(precision, "has_bfloat16", lambda device: False)
    with caplog.at_level(logging.WARNING):
        assert choose_precision("bfloat16", CPU).dtype == torch.bfloat16
    assert "use 'auto'" in caplog.text
    assert choose_precision("float16", CPU).dtype == torch.float16


def test_a_cpu_has_bfloat16_where_one_of_its_instruction_sets_does(monkeypatch: pytest.MonkeyPatch) -> None:
    for sets, expected in (({"avx2": True, "avx512_bf16": False}, False), ({"avx2": True, "amx_bf16": True}, True)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda sets=sets: sets)
        assert has_bfloat16(CPU) == expected


def test_an_evaluator_says_in_which_arithmetic_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "has_bfloat16", lambda device: False)
    vit = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 1}
    evaluator = CoalitionEvaluator(
        load_backbone("vit_tiny_patch16_224", "random", timm_args=vit), "drop", precision="auto"
    )
    assert evaluator.arithmetic.precision == "float32"


def test_an_arithmetic_that_does_not_exist_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"precision: expected one of .*'auto'.*got 'float8'"):
        choose_precision("float8", CPU)  # type: ignore[arg-type]
