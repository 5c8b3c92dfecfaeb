"""Rows on record: only the bytes that were recorded count, and the README's table is what they say."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from tve_pipeline.readme import README, with_recorded_tables
from tve_pipeline.recorded import RECORDS, Column, recorded_columns, table


def column(backbone: str, task: str, **means: tuple[float, float]) -> Column:
    noise = np.linspace(-0.01, 0.01, 20)
    return Column(
        backbone,
        task,
        {name: {"fidelity_plus": p + noise, "fidelity_minus": m + noise} for name, (p, m) in means.items()},
    )


def test_marks_say_where_tve_is_better_and_what_is_missing_is_a_dash() -> None:
    columns = [
        column("vit_tiny", "digit", tve=(0.5, 0.1), rise_100=(0.6, 0.2), rise_20=(0.4, 0.1), random=(0.1, -0.05)),
        column("vit_tiny", "shape", tve=(0.5, 0.1), rollout=(0.5, 0.05)),
        column("swin_scenes", "digit", tve=(0.25, 0.125), random=(0.2, 0.2)),
    ]
    assert table(columns).splitlines() == [
        "| | ViT-Ti digit | shape | Swin digit |",
        "|---|---|---|---|",
        "| **TVE** | .500 / .100 | .500 / .100 | .250 / .125 |",
        "| Attention rollout | – | .500 / .050 ·− | – |",
        "| RISE, 20 | .400 / .100 +· | – | – |",
        "| RISE, 100 | .600 / .200 −+ | – | – |",
        "| Random | .100 / −.050 +− | – | .200 / .200 ++ |",
    ]


def test_rows_that_are_asked_for_come_in_that_order_but_for_what_is_nowhere() -> None:
    columns = [column("vit", "digit", tve=(0.5, 0.1), centre=(0.2, 0.2), random=(0.1, 0.3))]
    rows = table(columns, ("random", "lime_50", "tve")).splitlines()[2:]
    assert [row.split("|")[1].strip() for row in rows] == ["Random", "**TVE**"]


def test_the_share_of_the_way_closes_the_table_where_random_and_exact_windows_differ() -> None:
    there = column("vit", "digit", tve=(0.5, 0.1), random=(0.1, 0.3), exact_windows=(0.6, 0.3))
    assert table([there]).splitlines()[-1] == "| *share of the way from random to exact windows* | .80 / – |"


def test_a_record_of_which_one_byte_changed_is_refused(tmp_path: Path) -> None:
    folder = shutil.copytree(RECORDS / "real" / "vit_tiny", tmp_path / "real" / "vit_tiny")
    file = folder / "facts-cifar10-tve.json"
    data = bytearray(file.read_bytes())
    data[0] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match=r"facts-cifar10-tve\.json: expected sha256 .* restore it from git"):
        next(recorded_columns("real", tmp_path))


def test_a_profile_that_is_not_on_record_is_told_which_are(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    with pytest.raises(ValueError, match=r"paper: expected a profile on record \(real\)"):
        next(recorded_columns("paper", tmp_path))


def test_the_readmes_tables_are_what_is_on_record() -> None:
    text = README.read_text()
    assert text == with_recorded_tables(text)
