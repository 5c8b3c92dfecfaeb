"""Shards: written the same twice, read back whole, and never short without an error."""

import io
import itertools
import json
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tve.digests import file_sha256
from tve.samples import Sample, decode_image, decode_masks, encode_masks
from tve.shards import INDEX_FILE, Shards, write_shards

TASKS = {"shape": ["disc", "square", "cross"]}
OBJECTS = ("digit", "shape")
NUM_SAMPLES = 25


def png(value: int, mode: str = "RGB") -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), value % 256, dtype=np.uint8)).convert(mode).save(file, "PNG")
    return file.getvalue()


def made(count: int = NUM_SAMPLES, labelled: bool = True) -> Iterator[Sample]:
    for index in range(count):
        masks = encode_masks([np.eye(8, dtype=np.bool_), np.eye(8, dtype=np.bool_)[::-1]]) if labelled else None
        labels = {"shape": index % 3} if labelled else None
        yield Sample(f"{index:09d}", png(index), "png", labels, masks, f"folder/{index}.v1.png")


def write(folder: Path, labelled: bool = True, count: int = NUM_SAMPLES) -> Path:
    splits = [("train", made(count, labelled)), ("test", made(3, labelled))]
    write_shards(folder, "made", splits, TASKS if labelled else {}, OBJECTS if labelled else (), 10, {"from": "a test"})
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "shards")


def test_what_is_read_is_what_was_written(folder: Path) -> None:
    shards = Shards.open(folder)
    assert list(shards.samples("train")) == list(made())
    assert list(shards.samples("test")) == list(made(3))
    assert shards.num_samples("train") == NUM_SAMPLES
    assert shards.tasks == {"shape": ("disc", "square", "cross")}
    assert shards.mask_objects == OBJECTS
    assert [entry.num_samples for entry in shards.files["train"]] == [10, 10, 5]


def test_the_same_samples_give_the_same_bytes(tmp_path: Path) -> None:
    first, second = write(tmp_path / "first"), write(tmp_path / "second")
    names = sorted(path.name for path in first.iterdir())
    assert names == sorted(path.name for path in second.iterdir())
    assert len(names) == 6
    assert all(file_sha256(first / name) == file_sha256(second / name) for name in names)


def test_label_free_shards_hold_pictures_alone(tmp_path: Path) -> None:
    folder = write(tmp_path / "shards", labelled=False)
    for path in folder.glob("*.tar"):
        with tarfile.open(path) as tar:
            assert all(name.endswith(".png") and name.count(".") == 1 for name in tar.getnames())
    shards = Shards.open(folder)
    assert shards.tasks == {}
    assert all(sample.labels is None and sample.masks is None for sample in shards.samples("train"))


def test_a_tar_cut_between_members_is_found(folder: Path) -> None:
    path = folder / "train-000000.tar"
    with tarfile.open(path) as tar:
        middle = tar.getmembers()[15].offset
    path.write_bytes(path.read_bytes()[:middle])
    with pytest.raises(ValueError, match=r"train-000000.tar: expected \d+ bytes, got \d+"):
        Shards.open(folder)


@pytest.mark.parametrize("name", ["train-000001.tar", "names.csv"])
def test_a_flipped_bit_is_found(folder: Path, name: str) -> None:
    data = bytearray((folder / name).read_bytes())
    data[5] ^= 1
    (folder / name).write_bytes(data)
    with pytest.raises(ValueError, match=f"{name}: expected sha256"):
        Shards.open(folder)


def test_a_missing_tar_is_found(folder: Path) -> None:
    (folder / "test-000000.tar").unlink()
    with pytest.raises(ValueError, match=r"test-000000.tar: expected a file, got none"):
        Shards.open(folder)


def test_a_tar_that_is_damaged_while_it_is_read_is_found_by_counting(folder: Path) -> None:
    shards = Shards.open(folder)
    path = folder / "train-000002.tar"
    with tarfile.open(path) as tar:
        header = tar.getmembers()[6].offset
    data = bytearray(path.read_bytes())
    data[header] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="expected 5 samples, got 2"):
        list(shards.samples("train"))


def test_counts_that_disagree_with_the_names_are_found(folder: Path) -> None:
    index = json.loads((folder / INDEX_FILE).read_text())
    index["splits"]["train"][0]["num_samples"] = 9
    (folder / INDEX_FILE).write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"expected the 25 samples of 'train' in names\.csv, got 24"):
        Shards.open(folder)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"format": 2}', '{"format": 1, "dataset": "x"}'])
def test_an_index_of_another_form_is_refused(folder: Path, text: str) -> None:
    (folder / INDEX_FILE).write_text(text)
    with pytest.raises(ValueError, match="expected a shard index of format 1"):
        Shards.open(folder)


def test_a_folder_without_an_index_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"index.json, which does not exist; make it"):
        Shards.open(tmp_path)


def test_shuffled_order_is_a_function_of_seed_and_epoch(folder: Path) -> None:
    shards = Shards.open(folder)

    def keys(seed: int, epoch: int) -> list[str]:
        return [sample.key for sample in shards.shuffled("train", seed, epoch, buffer=8)]

    assert keys(0, 0) == keys(0, 0)
    assert len({tuple(keys(seed, epoch)) for seed, epoch in itertools.product(range(3), range(3))}) == 9
    assert sorted(keys(0, 0)) == [sample.key for sample in made()]


def test_shuffled_samples_resume_at_start(folder: Path) -> None:
    shards = Shards.open(folder)
    whole = list(shards.shuffled("train", seed=1, epoch=2, buffer=8))
    for start in (0, 7, 25):
        assert list(shards.shuffled("train", seed=1, epoch=2, start=start, buffer=8)) == whole[start:]
    with pytest.raises(ValueError, match="start: expected 0 to the 25 samples of 'train', got 26"):
        shards.shuffled("train", seed=1, epoch=2, start=26)


def test_the_first_shuffled_samples_come_from_several_tars(tmp_path: Path) -> None:
    shards = Shards.open(write(tmp_path / "shards", labelled=False, count=200))
    first = itertools.islice(shards.shuffled("train", seed=0, epoch=0, buffer=100), 20)
    assert len({int(sample.key) // 10 for sample in first}) >= 6


def test_an_unknown_split_is_an_error_that_lists_the_splits(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"split of made: expected one of \['test', 'train'\], got 'val'"):
        Shards.open(folder).samples("val")


SAMPLE = next(made())


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (replace(SAMPLE, image=SAMPLE.image[:-30]), r"folder/0.v1.png: expected a complete picture"),
        (replace(SAMPLE, image=b"<svg/>"), "expected a complete picture .*got 6 bytes"),
        (replace(SAMPLE, key="n01.v1"), "expected letters, digits, '_' and '-', got 'n01.v1'"),
        (replace(SAMPLE, extension="gif"), "got 'gif'"),
        (replace(SAMPLE, labels={"shape": 3}), "expected shape below 3, got 3"),
        (replace(SAMPLE, labels={"colour": 0}), r"expected the tasks \['shape'\], got {'colour': 0}"),
        (replace(SAMPLE, labels=None), r"expected the tasks \['shape'\], got None"),
        (replace(SAMPLE, masks=None), r"expected masks of \['digit', 'shape'\], got none"),
    ],
)
def test_a_sample_that_does_not_fit_is_an_error_and_leaves_no_index(
    tmp_path: Path, sample: Sample, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        write_shards(tmp_path, "made", [("train", [sample])], TASKS, OBJECTS, 10, {})
    assert not (tmp_path / INDEX_FILE).exists()


def test_a_key_that_comes_twice_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected a new one, got '000000000' again"):
        write_shards(tmp_path, "made", [("train", [*made(3), SAMPLE])], TASKS, OBJECTS, 2, {})


def test_a_split_without_pictures_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="split 'train': expected at least one picture"):
        write_shards(tmp_path, "made", [("train", [])], {}, (), 10, {})


def test_shards_are_never_written_over_others(folder: Path) -> None:
    with pytest.raises(ValueError, match="expected a new or empty folder for made"):
        write(folder)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1"])
def test_every_kind_of_picture_is_decoded_to_rgb(mode: str) -> None:
    assert decode_image(png(255, mode)).getpixel((3, 3)) == (255, 255, 255)


def test_a_picture_with_too_many_pixels_is_refused_before_it_is_decoded() -> None:
    file = io.BytesIO()
    Image.new("1", (8001, 8000)).save(file, "PNG")
    with pytest.raises(ValueError, match="more than 64000000 pixels: 8001 x 8000"):
        decode_image(file.getvalue())


def test_masks_come_back_object_by_object() -> None:
    masks = np.random.default_rng(0).random((3, 5, 7)) > 0.5
    np.testing.assert_array_equal(decode_masks(encode_masks(list(masks)), 3), masks)
