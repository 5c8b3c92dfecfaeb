"""Sources: a folder, a zip and a tar of the same pictures are the same, and a bad one is a clear error."""

import gzip
import io
import itertools
import tarfile
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from tve.digests import file_sha256
from tve.samples import decode_masks
from tve.shards import Shards
from tve.sources import Picture, class_names, held_out_splits, list_pictures, named_splits, open_source
from tve_pipeline.params import PicturesDataset, ScenesDataset
from tve_pipeline.scenes import TASKS, scene
from tve_pipeline.shards import MASK_OBJECTS, write_pictures, write_scenes

FORMS = ("folder", "zip", "tar")


def jpeg(value: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (12, 10), (value % 256, 0, 0)).save(file, "JPEG")
    return file.getvalue()


def files() -> dict[str, bytes]:
    """Two splits of two classes of ten pictures, a table of them, and what does not belong."""
    names = [
        f"{split}/{animal}/{animal}.{number}.{extension}"
        for split, animal, (number, extension) in itertools.product(
            ("train", "test"), ("cat", "dog"), enumerate(["jpg"] * 9 + ["JPEG"])
        )
    ]
    rows = [f"{name},{name.split('/')[0]},{name.split('/')[1]}" for name in names]
    made = {f"images/{name}": jpeg(number) for number, name in enumerate(names)}
    table = "\n".join(["file,split,class", *rows]).encode()
    return made | {"labels.csv": table, "images/train/cat/.hidden.jpg": b"x", "images/notes.txt": b"x"}


def pack(root: Path, form: str, contents: dict[str, bytes]) -> Path:
    path = root / f"source.{form}"
    if form == "folder":
        for name, data in contents.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(data)
    elif form == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in contents.items():
                archive.writestr(name, data)
    else:
        with tarfile.open(path, "w") as tar:
            for name, data in contents.items():
                member = tarfile.TarInfo(f"./{name}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return path


def listed(
    path: Path, table: str | None = "labels.csv", column: str = "class", split: str | None = "split"
) -> list[Picture]:
    with open_source(path) as source:
        return list_pictures(source, "images", table, {"animal": column}, split)


def dataset(path: Path, **changes: object) -> PicturesDataset:
    values: dict[str, object] = {
        "kind": "pictures",
        "source": str(path),
        "sha256": None,
        "folder": "images",
        "table": "labels.csv",
        "split_column": "split",
        "splits": {"train": {"value": "train", "limit": None}, "val": {"value": "test", "limit": 8}},
        "hold_out": None,
        "rest": None,
        "tasks": {"animal": "class"},
        "shard_size": 8,
    }
    return PicturesDataset.model_validate(values | changes)


LABEL_FREE: dict[str, object] = {
    "table": None,
    "split_column": None,
    "splits": None,
    "tasks": None,
    "hold_out": {"split": "held", "count": 5},
    "rest": "pretrain",
}


@pytest.mark.parametrize("form", FORMS)
def test_a_source_gives_its_pictures_their_bytes_and_labels(tmp_path: Path, form: str) -> None:
    with open_source(pack(tmp_path, form, files())) as source:
        pictures = list_pictures(source, "images", "labels.csv", {"animal": "class"}, "split")
        assert len({picture.name for picture in pictures}) == len(pictures) == 40
        for picture in pictures:
            assert source.read(picture.file) == files()[f"images/{picture.name}"]
            assert picture.labels == {"animal": picture.name.split("/")[1]}
            assert picture.group == picture.name.split("/")[0]
            assert picture.extension in ("jpg", "jpeg")


def test_order_depends_on_names_alone(tmp_path: Path) -> None:
    backwards = dict(reversed(files().items()))
    orders = [listed(pack(tmp_path, "zip", files())), listed(pack(tmp_path, "tar", backwards))]
    assert [picture.name for picture in orders[0]] == [picture.name for picture in orders[1]]
    assert {picture.labels["animal"] for picture in orders[0][:10]} == {"cat", "dog"}


def test_class_folders_say_what_the_table_says(tmp_path: Path) -> None:
    path = pack(tmp_path, "folder", files())
    assert listed(path, table=None, column="folder", split=None) == listed(path)


def test_linked_class_folders_are_read_and_a_loop_ends(tmp_path: Path) -> None:
    path = pack(tmp_path, "folder", {"a/1.jpg": jpeg(1)})
    other = pack(tmp_path / "other", "folder", {"b/2.jpg": jpeg(2)})
    (path / "b").symlink_to(other / "b")
    (path / "a" / "loop").symlink_to(path)
    with open_source(path) as source:
        assert {picture.name for picture in list_pictures(source, None, None, {}, None)} == {
            "a/1.jpg",
            "b/2.jpg",
        }


def test_held_out_pictures_are_the_first_in_the_fixed_order() -> None:
    pictures = [Picture(f"{n}.jpg", f"{n}.jpg", {}, None) for n in range(10)]
    splits = held_out_splits(pictures, "held", 3, "rest")
    assert splits == {"rest": pictures[3:], "held": pictures[:3]}
    with pytest.raises(ValueError, match="held: expected 1 to 9 of 10 pictures, got 10"):
        held_out_splits(pictures, "held", 10, "rest")


def test_named_splits_take_at_most_their_limit(tmp_path: Path) -> None:
    splits = named_splits(listed(pack(tmp_path, "zip", files())), {"a": ("train", None), "b": ("test", 6)})
    assert {split: len(pictures) for split, pictures in splits.items()} == {"a": 20, "b": 6}
    assert {picture.group for picture in splits["b"]} == {"test"}
    with pytest.raises(ValueError, match=r"split 'b': expected one of the values \['test'\], got 'val'"):
        named_splits(splits["b"], {"b": ("val", None)})


def test_classes_that_are_numbers_are_in_the_order_of_numbers() -> None:
    pictures = [Picture("x", "x", {"digit": str(n), "name": f"n{n}"}, None) for n in (10, 9, 0, 9)]
    assert class_names(pictures, "digit") == ["0", "9", "10"]
    assert class_names(pictures, "name") == ["n0", "n10", "n9"]


def test_a_pinned_digest_is_compared(tmp_path: Path) -> None:
    path = pack(tmp_path, "zip", files())
    with open_source(path, file_sha256(path)):
        pass
    with (
        pytest.raises(ValueError, match=r"source.zip: expected sha256 0{64}, got"),
        open_source(path, "0" * 64),
    ):
        pass
    folder = pack(tmp_path, "folder", files())
    with pytest.raises(ValueError, match="set sha256 to null"), open_source(folder, "0" * 64):
        pass


HEADER = b"file,split,class\n"


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (b"file,label\n", r"no column \['class', 'split'\]; known columns: file, label"),
        (HEADER + b"b.jpg,train,cat\n", r"got 'b\.jpg', which is not there"),
        (HEADER + b"a.jpg,train\n", r"expected a class of \['animal'\] for a\.jpg"),
        (HEADER + b"a.jpg,train,cat\n" * 2, r"expected each picture once, got a\.jpg"),
        (b"\xff\xfe", "expected UTF-8"),
    ],
)
def test_a_table_that_does_not_fit_is_a_clear_error(tmp_path: Path, table: bytes, message: str) -> None:
    path = pack(tmp_path, "zip", {"images/a.jpg": b"", "labels.csv": table})
    with pytest.raises(ValueError, match=message):
        listed(path)


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ({}, "expected pictures .*got none"),
        ({"other/a.jpg": b""}, "below 'images/': expected pictures .*got none"),
        ({"images/a.jpg": b""}, r"expected the table labels\.csv"),
    ],
)
def test_a_source_that_does_not_fit_is_a_clear_error(tmp_path: Path, contents: dict[str, bytes], message: str) -> None:
    path = pack(tmp_path, "zip", contents)
    with pytest.raises(ValueError, match=message):
        listed(path)


def test_pictures_outside_class_folders_are_an_error(tmp_path: Path) -> None:
    path = pack(tmp_path, "zip", {"images/a.jpg": b""})
    with pytest.raises(ValueError, match=r"expected each picture in the folder of its class, got a.jpg"):
        listed(path, table=None, column="folder", split=None)


def test_files_that_are_no_source_are_errors(tmp_path: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("not an archive")
    packed = tmp_path / "source.tar.gz"
    packed.write_bytes(gzip.compress(pack(tmp_path, "tar", files()).read_bytes()))
    (empty := tmp_path / "empty").write_bytes(b"")
    for path in (text, packed, empty):
        with pytest.raises(ValueError, match="a tar that is not compressed"), open_source(path):
            pass
    with pytest.raises(ValueError, match="which does not exist"), open_source(tmp_path / "none.zip"):
        pass


def test_a_cut_or_damaged_tar_is_an_error(tmp_path: Path) -> None:
    path = pack(tmp_path, "tar", files())
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        member = tar.getmembers()[9]
    flipped = bytearray(whole)
    flipped[member.offset] ^= 1
    for damaged in (whole[: member.offset], whole[: member.offset_data + 7], bytes(flipped)):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="expected a complete tar; the file is cut short or damaged"):
            listed(path)


def test_a_damaged_picture_in_a_zip_is_an_error_that_names_it(tmp_path: Path) -> None:
    path = pack(tmp_path, "zip", {"images/a.jpg": b"0123456789"})
    path.write_bytes(path.read_bytes().replace(b"0123456789", b"0123456780"))
    with (
        open_source(path) as source,
        pytest.raises(ValueError, match=r"images/a.jpg: expected a readable file"),
    ):
        source.read("images/a.jpg")


@pytest.mark.parametrize("form", FORMS)
def test_pictures_keep_their_bytes_and_labels_in_shards(tmp_path: Path, form: str) -> None:
    write_pictures(tmp_path / "shards", "pets", dataset(pack(tmp_path, form, files())))
    shards = Shards.open(tmp_path / "shards")
    assert shards.tasks == {"animal": ("cat", "dog")}
    assert {split: shards.num_samples(split) for split in shards.splits} == {"train": 20, "val": 8}
    for sample in shards.samples("train"):
        assert sample.image == files()[f"images/{sample.name}"]
        assert sample.labels == {"animal": int("dog" in sample.name)}


def test_label_free_pictures_have_no_label_and_are_held_out_by_name(tmp_path: Path) -> None:
    write_pictures(tmp_path / "shards", "pool", dataset(pack(tmp_path, "zip", files()), **LABEL_FREE))
    shards = Shards.open(tmp_path / "shards")
    assert shards.tasks == {}
    names = {split: {sample.name for sample in shards.samples(split)} for split in shards.splits}
    assert {split: len(members) for split, members in names.items()} == {"pretrain": 35, "held": 5}
    assert not names["held"] & names["pretrain"]
    assert all(sample.labels is None for split in shards.splits for sample in shards.samples(split))


def test_a_picture_that_does_not_decode_is_an_error_that_names_it(tmp_path: Path) -> None:
    path = pack(tmp_path, "folder", files() | {"images/train/dog/dog.3.jpg": jpeg(0)[:200]})
    with pytest.raises(ValueError, match=r"train/dog/dog.3.jpg: expected a complete picture"):
        write_pictures(tmp_path / "shards", "pets", dataset(path))


def test_a_task_with_one_class_is_an_error(tmp_path: Path) -> None:
    path = pack(tmp_path, "zip", {f"images/cat/{n}.jpg": jpeg(n) for n in range(4)})
    changes = LABEL_FREE | {"tasks": {"animal": "folder"}, "hold_out": {"split": "held", "count": 2}}
    with pytest.raises(ValueError, match=r"task 'animal': expected two classes or more, got \['cat'\]"):
        write_pictures(tmp_path / "shards", "pets", dataset(path, **changes))


def test_shards_of_scenes_hold_the_scenes(tmp_path: Path) -> None:
    scenes = [scene(5, "test", index) for index in range(3)]
    made = ScenesDataset(kind="scenes", seed=5, labelled=True, splits={"train": 7, "test": 3}, shard_size=4)
    write_scenes(tmp_path / "first", "scenes", made)
    write_scenes(tmp_path / "second", "scenes", made)
    for path in (tmp_path / "first").iterdir():
        assert file_sha256(path) == file_sha256(tmp_path / "second" / path.name)
    shards = Shards.open(tmp_path / "first")
    assert shards.tasks == TASKS
    for sample, expected in zip(shards.samples("test"), scenes, strict=True):
        assert sample.labels == expected.labels
        assert sample.masks is not None
        masks = decode_masks(sample.masks, len(MASK_OBJECTS))
        assert all((masks[bit] == expected.masks[name]).all() for bit, name in enumerate(shards.mask_objects))


def test_label_free_scenes_hold_neither_labels_nor_masks(tmp_path: Path) -> None:
    made = ScenesDataset(kind="scenes", seed=0, labelled=False, splits={"pretrain": 3}, shard_size=4)
    write_scenes(tmp_path / "shards", "scenes", made)
    with tarfile.open(tmp_path / "shards" / "pretrain-000000.tar") as tar:
        assert tar.getnames() == [f"{index:09d}.png" for index in range(3)]
    with pytest.raises(ValueError, match=r"datasets.scenes.splits: expected splits among .* got \['dev'\]"):
        write_scenes(tmp_path / "other", "scenes", made.model_copy(update={"splits": {"dev": 3}}))
