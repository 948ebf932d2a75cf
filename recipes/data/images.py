"""Images with a class each: IDX files (the format of MNIST), a folder per class, and scikit-learn's digits.

A row's content is `{"image": uint8 array (H, W, C), "label": str}` with C = 1 (grey) or 3 (RGB).
"""

from __future__ import annotations

import importlib.metadata
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, BinaryIO

import numpy as np

from conf.errors import Problem, RequestError, did_you_mean
from conf.schema import DataConfig
from recipes.data.changes import PASSED_OVER
from recipes.data.readers import _first_line
from recipes.data.rows import Meter, Problems, Row
from recipes.data.sources import FileSource, Source, _hash, find_files, held_out_row
from recipes.data.streams import BrokenFileError, FileFormat, open_bytes
from recipes.data.values import assigned

IDX_LABELS, IDX_GREY, IDX_COLOUR = 0x00000801, 0x00000803, 0x00000804
"""First four bytes: unsigned bytes in 1 (N), 3 (N×H×W) or 4 (N×H×W×C) dimensions."""
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif")
SPLIT_NAMES = {"train", "training", "val", "valid", "validation", "dev", "test", "testing", "eval"}
DIGITS = 1797


def coloured(image: np.ndarray, channels: int) -> np.ndarray:
    """(H, W, 1 or 3) uint8 → (H, W, channels) uint8. Grey from RGB is ITU-R 601 luma.

    Raises ValueError for any other number of channels.
    """
    from PIL import Image

    if channels not in (1, 3) or image.shape[2] not in (1, 3):
        raise ValueError(f"images have 1 or 3 channels, not {image.shape[2]} → {channels}")
    if image.shape[2] == channels:
        return image
    picture = Image.fromarray(image[:, :, 0] if channels == 3 else image).convert("RGB" if channels == 3 else "L")
    return np.array(picture).reshape(*image.shape[:2], channels)


class IdxSource(FileSource):
    """Images in the IDX file `path` (and `eval_path`), their labels in `target_path` (and `eval_target_path`).

    `where` is FILE:INDEX of the file of images, counted from 1. Without `eval_path` the split is by index.
    """

    def check(self) -> list[Problem]:
        found: list[Problem] = []
        for held_out, split in ((False, ("path", "target_path")), (True, ("eval_path", "eval_target_path"))):
            values = [getattr(self.config, name) for name in split]
            if held_out and values == [None, None]:
                continue
            paths = []
            for name, value in zip(split, values, strict=True):
                if value is None:
                    rule = "idx data has its images in one file and their labels in another"
                    found.append(Problem(f"{self.key}.{name}", "null", rule, f"{self.key}.{name}=FILE"))
                    continue
                try:
                    paths.append(self._one_file(name, value)[1])
                except RequestError as error:
                    found += error.problems
            if len(paths) == 2:
                problems = Problems()
                try:
                    shape = _check_pair(paths[0], paths[1], self.form, problems, whole=False)
                except OSError as error:
                    found.append(Problem(str(error.filename or paths[0]), "", f"cannot be read ({error.strerror})"))
                    continue
                found += problems.found
                if shape and shape[0] < 2 and self.config.eval_path is None:
                    rule = "needs at least two images, one of them is held out"
                    found.append(Problem(f"{self.key}.path", str(self.config.path), rule, f"{self.key}.eval_path=FILE"))
        return found

    def files(self, held_out: bool) -> list[tuple[str, Path]]:
        """The file of images and the file of labels; raises RequestError where one is missing."""
        if held_out and self.config.eval_path is None:
            return []
        names = ("eval_path", "eval_target_path") if held_out else ("path", "target_path")
        return [self._one_file(name, getattr(self.config, name)) for name in names]

    def inputs(self, held_out: bool) -> list[Path]:
        return super().inputs(held_out)[:1]

    def read(self, problems: Problems, meter: Meter) -> Iterator[Row]:
        by_index = self.config.eval_path is None
        for split in (False,) if by_index else (False, True):
            (_, images), (_, labels) = self.files(split)
            shape = _check_pair(images, labels, self.form, problems, whole=True)
            start = meter.done
            if shape is not None:
                for index, (image, label) in enumerate(_read_pair(images, labels, self.form, shape, meter)):
                    held_out = held_out_row(index, self.held_out) if by_index else split
                    yield Row(f"{images}:{index + 1}", held_out, {"image": image, "label": str(label)})
            meter.done = start + images.stat().st_size + labels.stat().st_size

    def _one_file(self, name: str, value: str | None) -> tuple[str, Path]:
        key = f"{self.key}.{name}"
        files = find_files("idx", key, value, None)
        if len(files) > 1:
            present = [str(path) for _, path in files]
            near = did_you_mean(f"{value}/{name}", present) or present[0]
            raise RequestError(Problem(key, str(value), f"must be one file, this is {len(files)}", assigned(key, near)))
        return files[0]


class ImageFolderSource(FileSource):
    """FOLDER/CLASS/…: the class of an image is the first folder below `path` (or `eval_path`).

    Sizes may differ. A grey image (Pillow's mode "L", or 16 bits) has one channel; all others become RGB, which drops
    transparency. Of an animation the first frame counts; a photograph is turned as its EXIF orientation says.

    Without `eval_path` the split is by file (by the hash of its relative name), except that a class with one image
    only trains, and that one image of each class always does.
    """

    config: DataConfig

    def files(self, held_out: bool) -> list[tuple[str, Path]]:
        """(CLASS/…/NAME, file), sorted. Raises RequestError when there is no image."""
        found = [(name, path) for name, path in self._found(held_out) if path.suffix.lower() in IMAGE_SUFFIXES]
        if not found and not (held_out and self.config.eval_path is None):
            key, value = self._place(held_out)
            rule = f"there are no images in it ({' '.join(IMAGE_SUFFIXES)})"
            raise RequestError(Problem(key, str(value), rule, f"{key}=FOLDER with a folder per class"))
        return found[: self.max_files]

    def _place(self, held_out: bool) -> tuple[str, str | None]:
        """(key, value) of where the files of a split are."""
        value = self.config.eval_path if held_out else self.config.path
        return f"{self.key}.{'eval_path' if held_out else 'path'}", value

    def _found(self, held_out: bool) -> list[tuple[str, Path]]:
        """The same with all that is no image."""
        key, value = self._place(held_out)
        return [] if held_out and value is None else find_files("images", key, value, None)

    def read(self, problems: Problems, meter: Meter) -> Iterator[Row]:
        train, evaluation = self.files(False), self.files(True)
        set_aside = set() if evaluation else held_out_of_classes([name for name, _ in train], self.held_out)
        for split, files in ((False, train), (True, evaluation)):
            for _, other in self._found(split) if self.max_files is None else ():
                if other.suffix.lower() not in IMAGE_SUFFIXES:
                    meter.note(PASSED_OVER, "files that are no images", str(other))
            for name, path in files:
                label, folder, _ = name.partition("/")
                if not label.isprintable():  # half a character, of another encoding than UTF-8
                    problems.add(Problem(str(path), "", "the name of its class is not text in UTF-8", "another name"))
                    continue
                if not folder:
                    problems.add(_classless(path))
                    continue
                image = _read_image(path, self.config.max_pixels, problems)
                meter.done += path.stat().st_size
                if image is not None:
                    yield Row(str(path), split or name in set_aside, {"image": image, "label": label})

    def _check_content(self, key: str, value: str, paths: list[Path], problems: Problems) -> None:
        try:
            files = self.files(key.endswith(".eval_path"))
        except RequestError as error:
            problems.found += error.problems
            return
        if loose := [path for name, path in files if "/" not in name]:
            problems.add(_classless(loose[0]))
            return
        classes = {name.partition("/")[0] for name, _ in files}
        if {name.lower() for name in classes} <= SPLIT_NAMES:
            rule = f"these folders are splits, not classes: {', '.join(sorted(classes))}"
            parts = {"path": f"{value}/TRAINING", "eval_path": f"{value}/EVALUATION"}
            nearest = " ".join(assigned(f"{self.key}.{name}", folder) for name, folder in parts.items())
            problems.add(Problem(key, value, rule, nearest))
        elif self.config.eval_path is None and len(files) == len(classes):
            rule = "no class has a second image that could be held out"
            problems.add(Problem(key, value, rule, f"{self.key}.eval_path=FOLDER"))


class DigitsSource(Source):
    """scikit-learn's digits: 1,797 grey images of 8×8, handwritten by 43 people. Needs no file and no network.

    Values 0…16 are scaled to 0…255. From https://archive.ics.uci.edu/dataset/80 (its test part).
    """

    def check(self) -> list[Problem]:
        try:
            importlib.metadata.version("scikit-learn")
        except importlib.metadata.PackageNotFoundError:
            rule = "these images come with scikit-learn, which is not installed"
            return [Problem(f"{self.key}.kind", "digits", rule, "pip install scikit-learn")]
        return []

    def fingerprint(self) -> str:
        return f"digits of scikit-learn {importlib.metadata.version('scikit-learn')}"

    def size(self) -> int:
        return DIGITS

    def read(self, problems: Problems, meter: Meter) -> Iterator[Row]:
        from sklearn.datasets import load_digits

        digits = load_digits()
        images = np.rint(digits.images * (255 / 16)).astype(np.uint8)[..., None]
        for index, (image, label) in enumerate(zip(images, digits.target, strict=True)):
            meter.done += 1
            content = {"image": image, "label": str(label)}
            yield Row(f"digits:{index + 1}", held_out_row(index, self.held_out), content)


def held_out_of_classes(names: list[str], share: float) -> set[str]:
    """`held_out_files` of CLASS/NAME, such that each class keeps an image to train on.

    Which one does not depend on the share: what a smaller share sets aside, a larger one does too. Not empty as long as
    one class has two images.
    """
    kept: dict[str, str] = {}
    for name in sorted(names, key=_hash):
        kept[name.partition("/")[0]] = name
    others = [name for name in names if name != kept[name.partition("/")[0]]]
    set_aside = {name for name in others if _hash(name) < share}
    return set_aside or set(sorted(others, key=_hash)[:1])


def _classless(path: Path) -> Problem:
    return Problem(str(path), "", "lies in no folder of a class", "FOLDER/CLASS/NAME, and FOLDER as the path")


def pixels(file: Path | BinaryIO, max_pixels: int) -> np.ndarray:
    """(H, W, 1 or 3) uint8: grey (Pillow's mode "L", or 16 bits) or RGB. Raises whatever Pillow does.

    And BrokenFileError for an image of more pixels, before any of them is decoded.
    """
    from PIL import Image, ImageOps

    with _without_limit(), Image.open(file) as opened:
        width, height = opened.size
        if width * height > max_pixels:
            rule = f"{width} × {height} pixels, more than data.max_pixels={max_pixels}"
            raise BrokenFileError(
                rule, f"a smaller copy, or data.max_pixels={width * height} for an image that you know"
            )
        image = ImageOps.exif_transpose(opened)
        if image.mode in ("I", "F"):
            raise ValueError(f"its values are of mode {image.mode} (32 bits), of no known range; save 8 or 16 bits")
        if image.mode.startswith("I;16"):  # Pillow would clip these at 255
            return (np.asarray(image) // 257).astype(np.uint8)[..., None]
        array = np.array(image if image.mode == "L" else image.convert("RGB"))
        return array if array.ndim == 3 else array[..., None]


@contextmanager
def _without_limit() -> Iterator[None]:
    """Pillow 12 warns of images above a limit of its own, and refuses those of twice as many pixels."""
    from PIL import Image

    before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


def _read_image(path: Path, max_pixels: int, problems: Problems) -> np.ndarray | None:
    """`pixels` of a file; None (and a problem) for one that Pillow cannot read."""
    from PIL import UnidentifiedImageError

    try:
        return pixels(path, max_pixels)
    except BrokenFileError as error:
        problems.add(error.problem(path))
    except UnidentifiedImageError:
        problems.add(Problem(str(path), "", "not an image that Pillow can read"))
    except Exception as error:  # a broken file raises anything from SyntaxError to struct.error, by its format
        problems.add(Problem(str(path), "", f"the image cannot be read ({_first_line(error)})"))
    return None


def _check_pair(
    images: Path, labels: Path, form: FileFormat, problems: Problems, whole: bool
) -> tuple[int, int, int, int] | None:
    """(N, H, W, C) of two IDX files that belong together; None (and problems) where they are wrong.

    whole: also run through compressed files, whose size does not show otherwise.
    """
    shape = _check_idx(images, form, (IDX_GREY, IDX_COLOUR), problems, whole)
    count = _check_idx(labels, form, (IDX_LABELS,), problems, whole)
    if shape is None or count is None:
        return None
    if shape[0] != count[0]:
        problems.add(Problem(str(labels), "", f"has {count[0]} labels, but {images} has {shape[0]} images"))
        return None
    if 0 in shape:
        problems.add(Problem(str(images), "", f"has no images with pixels, it has {'×'.join(map(str, shape))}"))
        return None
    channels = shape[3] if len(shape) == 4 else 1
    if channels not in (1, 3):
        problems.add(Problem(str(images), "", f"its images have {channels} channels, not 1 (grey) or 3 (RGB)"))
        return None
    return shape[0], shape[1], shape[2], channels


def _check_idx(
    path: Path, form: FileFormat, magics: tuple[int, ...], problems: Problems, whole: bool
) -> tuple[int, ...] | None:
    """The dimensions of an IDX file; None (and a problem) for another format, or a size that is not the header's."""
    stream, raw = open_bytes(path, form)
    try:
        with raw, stream:
            start = stream.read(4)
            magic = int.from_bytes(start, "big")
            if len(start) < 4 or magic not in magics:
                problems.add(_wrong_magic(path, start, magics))
                return None
            dimensions = magic & 0xFF
            header = stream.read(4 * dimensions)
            shape = struct.unpack(f">{dimensions}I", header) if len(header) == 4 * dimensions else None
            zipped = stream is not raw
            if zipped and shape and not whole:
                return shape
            found = _length(stream) + 4 + len(header) if zipped else path.stat().st_size
    except BrokenFileError as error:
        problems.add(error.problem(path))
        return None
    expected = 4 + 4 * dimensions
    for_shape = "its header"
    if shape:
        size = 1
        for length in shape:
            size *= length  # math of Python: four dimensions of 32 bits overflow those of numpy
        expected += size
        for_shape = "×".join(map(str, shape))
    if found != expected:
        unit = "bytes uncompressed" if zipped else "bytes"
        rule = f"{for_shape} needs {expected} {unit}, the file has {found}: it is damaged or not complete"
        problems.add(Problem(str(path), "", rule))
        return None
    return shape


def _wrong_magic(path: Path, start: bytes, magics: tuple[int, ...]) -> Problem:
    what = "labels" if IDX_LABELS in magics else "images"
    expected = " or ".join(f"0x{magic:08x}" for magic in magics)
    rule = f"not an IDX file of {what}: it begins with 0x{start.hex()}, not with {expected}"
    swapped = int.from_bytes(start, "big") in ({IDX_GREY, IDX_COLOUR} if what == "labels" else {IDX_LABELS})
    return Problem(str(path), "", rule, "path=IMAGES target_path=LABELS; these look swapped" if swapped else "")


def _length(stream: IO[bytes]) -> int:
    """Bytes from here to the end, not kept."""
    length = 0
    while block := stream.read(1 << 20):
        length += len(block)
    return length


def _read_pair(
    images: Path, labels: Path, form: FileFormat, shape: tuple[int, int, int, int], meter: Meter
) -> Iterator[tuple[np.ndarray, int]]:
    """((H, W, C) uint8, label) of two files that `_check_pair` found whole."""
    count, *pixels = shape
    size, start = int(np.prod(pixels)), meter.done
    image_stream, image_raw = open_bytes(images, form)
    label_stream, label_raw = open_bytes(labels, form)
    with image_raw, image_stream, label_raw, label_stream:
        image_stream.read(_header_bytes(image_stream))
        label_stream.read(8)
        for _ in range(count):
            image = np.frombuffer(bytearray(image_stream.read(size)), dtype=np.uint8)  # writable, as torch wants it
            meter.done = start + image_raw.tell() + label_raw.tell()
            yield image.reshape(pixels), label_stream.read(1)[0]


def _header_bytes(stream: IO[bytes]) -> int:
    """What is left of the header after its first four bytes, which this reads."""
    return 4 * (int.from_bytes(stream.read(4), "big") & 0xFF)
