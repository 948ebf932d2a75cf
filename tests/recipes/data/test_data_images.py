"""Images of IDX files, of folders and of scikit-learn: their rows, their split, and each way they can be broken."""

from __future__ import annotations

import gzip
import struct
import subprocess
import sys

import numpy as np
import pytest
from commands import ROOT
from PIL import Image

from conf.errors import RequestError
from recipes.data.images import DIGITS, DigitsSource, IdxSource, ImageFolderSource, coloured, held_out_of_classes
from recipes.data.rows import Meter, Problems
from recipes.data.sources import held_out_row


def open_source(kind, data):
    return kind(data, "data", data.held_out, data.max_files)


def read(kind, data):
    """(rows, text of all problems) of a source."""
    problems, source = Problems(), open_source(kind, data)
    meter = Meter(source.size())
    rows = list(source.read(problems, meter))
    assert problems.found or meter.done == meter.total
    return rows, "\n".join(map(str, problems.found))


def checked(kind, data) -> str:
    return "\n".join(map(str, open_source(kind, data).check()))


def idx(array: np.ndarray) -> bytes:
    """The IDX file of an array of bytes."""
    return struct.pack(f">I{array.ndim}I", 0x00000800 + array.ndim, *array.shape) + array.tobytes()


PIXELS = np.random.default_rng(0).integers(0, 256, (20, 5, 4), dtype=np.uint8)
LABELS = np.arange(20, dtype=np.uint8) % 10


@pytest.fixture
def pair(write, config):
    """pair(images, labels, suffix, **keys): a configuration of two IDX files, given as arrays or as bytes."""

    def pair(images=PIXELS, labels=LABELS, suffix="", **keys):
        paths = [
            str(write(name + suffix, content if isinstance(content, bytes) else idx(content)))
            for name, content in (("images-idx3-ubyte", images), ("labels-idx1-ubyte", labels))
        ]
        return config(**{"kind": "idx", "path": paths[0], "target_path": paths[1]} | keys)

    return pair


@pytest.fixture
def folder(tmp_path):
    """folder("cat/1.png", …) → a folder with an image of random grey under each name."""

    def folder(*names, root="pictures"):
        for number, name in enumerate(names):
            path = tmp_path / root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(PIXELS[number % 20]).save(path)
        return tmp_path / root

    return folder


# IDX


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_rows_are_the_arrays_of_the_files(pair, suffix):
    data = pair(suffix=suffix)
    assert checked(IdxSource, data) == ""
    rows, broken = read(IdxSource, data)
    assert broken == "" and len(rows) == 20
    assert [row.content["label"] for row in rows] == [str(label) for label in LABELS]
    assert [row.where for row in rows] == [f"{data.path}:{index}" for index in range(1, 21)]
    assert [row.held_out for row in rows] == [held_out_row(index, 0.2) for index in range(20)]
    for row, pixels in zip(rows, PIXELS, strict=True):
        assert row.content["image"].dtype == np.uint8 and row.content["image"].flags.writeable
        np.testing.assert_array_equal(row.content["image"], pixels[..., None])


def test_idx_files_in_colour_and_with_files_of_their_own_to_evaluate(pair, write):
    colour = np.random.default_rng(1).integers(0, 256, (3, 2, 2, 3), dtype=np.uint8)
    evaluation = write("eval", idx(colour[:2])), write("eval-labels", idx(LABELS[5:7]))
    data = pair(colour, LABELS[:3], eval_path=str(evaluation[0]), eval_target_path=str(evaluation[1]))
    assert checked(IdxSource, data) == ""
    rows, _ = read(IdxSource, data)
    assert [row.held_out for row in rows] == [False, False, False, True, True]
    assert [row.content["label"] for row in rows] == ["0", "1", "2", "5", "6"]
    assert rows[3].where == f"{evaluation[0]}:1"
    np.testing.assert_array_equal(rows[2].content["image"], colour[2])


def test_the_fingerprint_covers_the_labels(pair):
    first = open_source(IdxSource, pair()).fingerprint()
    assert open_source(IdxSource, pair()).fingerprint() == first
    assert open_source(IdxSource, pair(labels=LABELS[::-1].copy())).fingerprint() != first


def test_idx_without_its_labels(pair):
    message = checked(IdxSource, pair(target_path=None))
    assert "data.target_path=null" in message and "try: data.target_path=FILE" in message
    message = checked(IdxSource, pair(eval_path="nowhere"))
    assert "data.eval_path=nowhere: there is no such file" in message and "data.eval_target_path=null" in message
    assert "data.eval_path=null" in checked(IdxSource, pair(eval_target_path="nowhere"))
    assert "data.path=null" in checked(IdxSource, pair(path=None))


def test_a_folder_is_not_an_idx_file(pair, tmp_path):
    message = checked(IdxSource, pair(path=str(tmp_path)))
    assert "must be one file, this is 2" in message and "try: data.path=" in message
    with pytest.raises(RequestError, match="must be one file"):
        read(IdxSource, pair(path=str(tmp_path)))


BROKEN = {
    "magic": (b"\x00\x00\x0d\x03" + idx(PIXELS)[4:], idx(LABELS), "begins with 0x00000d03, not with 0x00000803"),
    "swapped": (idx(LABELS), idx(PIXELS), "look swapped"),
    "nothing": (b"", idx(LABELS), "not an IDX file of images"),
    "half a header": (idx(PIXELS)[:10], idx(LABELS), "its header needs 16 bytes"),
    "too short": (idx(PIXELS)[:-3], idx(LABELS), "20×5×4 needs 416 bytes"),
    "too long": (idx(PIXELS) + b"abc", idx(LABELS), "20×5×4 needs 416 bytes"),
    "labels too short": (idx(PIXELS), idx(LABELS)[:-1], "20 needs 28 bytes"),
    "counts": (idx(PIXELS), idx(LABELS[:19]), "has 19 labels, but"),
    "no pixels": (idx(PIXELS[:, :0]), idx(LABELS), "has no images with pixels"),
    "no images": (idx(PIXELS[:0]), idx(LABELS[:0]), "has no images with pixels"),
    "two channels": (idx(np.zeros((20, 2, 2, 2), np.uint8)), idx(LABELS), "2 channels"),
    "more than there is memory": (struct.pack(">5I", 0x804, *[2**32 - 1] * 4), idx(LABELS), "the file has 20"),
}


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("what", BROKEN)
def test_broken_idx_files_are_named_with_what_is_wrong(pair, what, suffix):
    images, labels, expected = BROKEN[what]
    data = pair(images, labels, suffix)
    rows, broken = read(IdxSource, data)
    assert not rows and expected in broken
    assert (data.target_path if "labels" in what or what == "counts" else data.path) in broken
    assert "needs" not in broken or f"the file has {len(labels if 'labels' in what else images)}" in broken
    if not suffix or "needs" not in broken:  # the length of a compressed file shows when it is read
        assert expected in checked(IdxSource, data)


@pytest.mark.parametrize("damage", [lambda data: data[:-20], lambda data: data[:40] + b"\xff" * 9 + data[49:]])
def test_damaged_gzip(pair, write, damage):
    data = pair(suffix=".gz")
    path = write("damaged", damage(gzip.compress(idx(PIXELS), mtime=0)))
    data.path = str(path)
    rows, broken = read(IdxSource, data)
    assert not rows and f"{path}: the gzip file is damaged" in broken


def test_idx_files_that_may_not_be_read(pair, monkeypatch):
    def refuse(path, form):
        raise PermissionError(13, "Permission denied", str(path))

    data = pair()
    monkeypatch.setattr("recipes.data.images.open_bytes", refuse)  # permissions do not bind a superuser
    assert checked(IdxSource, data) == f"{data.path}: cannot be read (Permission denied)"


def test_one_image_cannot_be_split(pair):
    assert "at least two images" in checked(IdxSource, pair(PIXELS[:1], LABELS[:1]))


# Folders


def test_the_class_is_the_folder(folder, config):
    root = folder("cat/1.png", "cat/2.PNG", "cat/more/3.bmp", "dog/1.png", "dog/2.gif", "dog/3.webp")
    (root / "cat" / "notes.txt").write_text("no image")
    (root / "cat" / ".hidden.png").write_text("no image")
    data = config(kind="images", path=str(root))
    assert checked(ImageFolderSource, data) == ""
    source, problems = open_source(ImageFolderSource, data), Problems()
    rows = list(source.read(problems, Meter()))
    assert not problems.found
    assert {row.where.removeprefix(f"{root}/"): row.content["label"] for row in rows} == {
        "cat/1.png": "cat", "cat/2.PNG": "cat", "cat/more/3.bmp": "cat", "dog/1.png": "dog", "dog/2.gif": "dog",
        "dog/3.webp": "dog"}  # fmt: skip
    np.testing.assert_array_equal(rows[0].content["image"], PIXELS[0][..., None])
    for held_out in (False, True):
        assert any(row.held_out == held_out for row in rows)
    assert {row.content["label"] for row in rows if not row.held_out} == {"cat", "dog"}
    assert source.fingerprint() == source.fingerprint() and source.size() > 0


def test_a_folder_of_its_own_to_evaluate(folder, config):
    train, evaluation = folder("cat/1.png", "dog/1.png", root="train"), folder("cat/1.png", root="val")
    rows, _ = read(ImageFolderSource, config(kind="images", path=str(train), eval_path=str(evaluation)))
    assert [(row.content["label"], row.held_out) for row in rows] == [("cat", False), ("dog", False), ("cat", True)]


@pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
def test_each_class_keeps_an_image_to_train_on(share):
    names = [f"{label}/{number}.png" for label, count in (("a", 1), ("b", 2), ("c", 9)) for number in range(count)]
    set_aside = held_out_of_classes(names, share)
    assert set_aside and {name[0] for name in names if name not in set_aside} == {"a", "b", "c"}
    assert held_out_of_classes(names[::-1], share) == set_aside
    assert held_out_of_classes(["a/1.png", "b/1.png"], share) == set()


def colours(mode: str) -> Image.Image:
    image = Image.new("RGB", (3, 2), (200, 100, 50))
    image.putpixel((0, 0), (0, 255, 0))
    return image.convert(mode)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L", "LA", "1", "I;16"])
def test_every_mode_becomes_grey_or_rgb(tmp_path, config, mode):
    (tmp_path / "a").mkdir()
    sixteen_bits = np.array([[0, 256 * 100, 65535]], dtype=np.uint16)
    image = Image.fromarray(sixteen_bits) if mode == "I;16" else colours(mode)
    for number in range(2):
        image.save(tmp_path / "a" / f"{number}.png")
    rows, broken = read(ImageFolderSource, config(kind="images", path=str(tmp_path)))
    assert broken == ""
    pixels = rows[0].content["image"]
    assert pixels.dtype == np.uint8
    if mode == "I;16":
        assert pixels[0, :, 0].tolist() == [0, 99, 255]  # scaled, not clipped
    elif mode == "L":
        np.testing.assert_array_equal(pixels, np.asarray(image)[..., None])
    else:
        np.testing.assert_array_equal(pixels, np.asarray(image.convert("RGB")))


def test_photographs_are_turned_as_they_were_taken(tmp_path, config):
    (tmp_path / "a").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    for number in range(2):
        Image.new("RGB", (8, 4)).save(tmp_path / "a" / f"{number}.jpg", exif=exif)
    rows, _ = read(ImageFolderSource, config(kind="images", path=str(tmp_path)))
    assert rows[0].content["image"].shape == (8, 4, 3)


def test_broken_images_are_named_and_the_others_are_read(folder, config):
    root = folder("a/1.png", "a/2.png", "a/3.png", "a/4.png", "a/5.jpg", "b/1.png")
    (root / "a/2.png").write_bytes((root / "a/1.png").read_bytes()[:-30])
    (root / "a/3.png").write_bytes(b"<html>404</html>")
    (root / "a/4.png").write_bytes(b"")
    (root / "a/5.jpg").write_bytes((root / "a/5.jpg").read_bytes()[:-200])
    rows, broken = read(ImageFolderSource, config(kind="images", path=str(root)))
    assert [row.where.removeprefix(f"{root}/") for row in rows] == ["a/1.png", "b/1.png"]
    lines = broken.splitlines()
    assert [line.partition(":")[0].removeprefix(f"{root}/") for line in lines] == [
        "a/2.png", "a/3.png", "a/4.png", "a/5.jpg"]  # fmt: skip
    assert "cannot be read (" in lines[0] and lines[1].endswith("not an image that Pillow can read")


def test_folders_that_are_no_classes(folder, config, tmp_path):
    root = folder("train/cat/1.png", "val/cat/2.png")
    message = checked(ImageFolderSource, config(kind="images", path=str(root)))
    assert "splits, not classes: train, val" in message and "data.eval_path=" in message
    loose = config(kind="images", path=str(folder("1.png", "a/2.png", root="loose")))
    assert "1.png: lies in no folder of a class" in checked(ImageFolderSource, loose)
    assert "1.png: lies in no folder of a class" in read(ImageFolderSource, loose)[1]
    single = config(kind="images", path=str(folder("a/1.png", "b/2.png", root="single")))
    assert "no class has a second image" in checked(ImageFolderSource, single)
    (tmp_path / "texts" / "a").mkdir(parents=True)
    (tmp_path / "texts" / "a" / "1.txt").write_text("no image")
    assert "there are no images in it" in checked(ImageFolderSource, config(kind="images", path=f"{tmp_path}/texts"))
    assert "no such file or folder" in checked(ImageFolderSource, config(kind="images", path=f"{tmp_path}/none"))
    assert "data.path=null" in checked(ImageFolderSource, config(kind="images"))


# Digits


def test_digits_are_those_of_scikit_learn(config):
    from sklearn.datasets import load_digits

    data = config(kind="digits")
    assert checked(DigitsSource, data) == ""
    rows, _ = read(DigitsSource, data)
    digits = load_digits()
    assert len(rows) == DIGITS and rows[0].where == "digits:1"
    assert [row.content["label"] for row in rows] == [str(label) for label in digits.target]
    images = np.stack([row.content["image"] for row in rows])
    assert images.shape == (DIGITS, 8, 8, 1) and images.dtype == np.uint8 and (images.min(), images.max()) == (0, 255)
    assert np.abs(images[..., 0] / 255 * 16 - digits.images).max() <= 16 / 255 / 2
    assert [row.held_out for row in rows] == [held_out_row(index, 0.2) for index in range(DIGITS)]
    assert 300 < sum(row.held_out for row in rows) < 420
    assert open_source(DigitsSource, data).fingerprint() == open_source(DigitsSource, data).fingerprint()


def test_folders_behind_links_are_read_and_loops_end(tmp_path, config):
    folder, elsewhere = tmp_path / "pictures", tmp_path / "elsewhere"
    for place in (folder / "cat", elsewhere):
        place.mkdir(parents=True)
        for number in range(3):
            Image.fromarray(PIXELS[number]).save(place / f"{number}.png")
    (folder / "bird").symlink_to(elsewhere, target_is_directory=True)
    (elsewhere / "back").symlink_to(folder, target_is_directory=True)
    rows, _ = read(ImageFolderSource, config(kind="images", path=str(folder)))
    assert sorted(row.content["label"] for row in rows) == ["bird"] * 3 + ["cat"] * 3


# Colours


def test_coloured():
    grey, flat = PIXELS[0][..., None], np.full((6, 3, 3), (10, 200, 30), np.uint8)
    assert coloured(grey, 1) is grey and coloured(flat, 3) is flat
    np.testing.assert_array_equal(coloured(grey, 3), grey.repeat(3, axis=2))
    luma = round(0.299 * 10 + 0.587 * 200 + 0.114 * 30)
    assert coloured(flat, 1).shape == (6, 3, 1) and np.abs(coloured(flat, 1).astype(int) - luma).max() <= 1
    for image, channels in ((grey, 2), (np.zeros((2, 2, 4), np.uint8), 3)):
        with pytest.raises(ValueError, match="1 or 3 channels"):
            coloured(image, channels)


def test_reading_imports_no_torch():
    code = "import sys, recipes.data.images, recipes.data.numbers; sys.exit({'torch', 'sklearn'} & set(sys.modules))"
    subprocess.run([sys.executable, "-c", code.replace("sys.exit(", "sys.exit(bool(") + ")"], check=True, cwd=ROOT)
