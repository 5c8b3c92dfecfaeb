"""An export's own proof: what is in the folder is what was signed, and nothing else."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tve_pipeline.cli import main
from tve_pipeline.lineage.keys import own_signer
from tve_pipeline.lineage.manifest import FILE, sign_folder, verify_folder


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TVE_SIGNING_KEY", str(tmp_path / "key.pem"))
    folder = tmp_path / "export"
    (folder / "backbone").mkdir(parents=True)
    (folder / "weights.bin").write_bytes(b"weights")
    (folder / "backbone" / "model.bin").write_bytes(b"model")
    sign_folder(folder, {"explainer": "x"}, own_signer())
    return folder


def problems(folder: Path) -> list[str]:
    signer = own_signer()
    assert signer is not None
    return verify_folder(folder, {}, signer.public_key).problems


def test_what_was_signed_is_whole_and_signs_to_the_same_bytes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert problems(folder) == []
    before = (folder / FILE).read_bytes()
    sign_folder(folder, {"explainer": "x"}, own_signer())
    assert (folder / FILE).read_bytes() == before
    assert main(["verify", str(folder)]) == 0
    assert "OK: 2 files, own" in capsys.readouterr().out
    monkeypatch.setenv("TVE_SIGNING_KEY", "none")
    assert main(["verify", str(folder)]) == 3
    assert "UNPROVEN: 2 files, untrusted" in capsys.readouterr().out
    assert main(["verify", str(tmp_path / "nowhere")]) == 2
    for left in ("{", None):  # garbled, then gone
        (folder / FILE).write_text(left) if left else (folder / FILE).unlink()
        assert main(["verify", str(folder)]) == 1


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda folder: (folder / "weights.bin").write_bytes(b"Weights"), "weights.bin was altered"),
        (lambda folder: (folder / "weights.bin").unlink(), "weights.bin is gone"),
        (lambda folder: (folder / "more.bin").write_bytes(b""), "more.bin is not in the manifest"),
        (lambda folder: (folder / "backbone" / "link").symlink_to("model.bin"), "backbone/link is a link"),
        (
            lambda folder: (folder / FILE).write_text(
                (folder / FILE).read_text().replace('"payload": "ey', '"payload": "fy')
            ),
            "expected a DSSE envelope",
        ),
    ],
)
def test_what_was_spoiled_is_named(folder: Path, spoil: Callable[[Path], object], said: str) -> None:
    spoil(folder)
    try:
        found = problems(folder)
    except ValueError as error:
        found = [str(error)]
    assert any(said in each for each in found), found


def test_without_a_key_the_manifest_is_unsigned_and_says_so(folder: Path) -> None:
    sign_folder(folder, {}, None)
    assert verify_folder(folder, {}).opened.standing == "unsigned"
