"""Where rows come from: the standard library, text files, jsonl, csv, parquet (hub data sets: `hub.py`).

Which documents are held out is a pure function of a file's relative path (stdlib, text) or of a row's index
(jsonl, csv, parquet, hub), never of the seed: runs with other seeds are compared on the same held-out set.
"""

from __future__ import annotations

import functools
import glob
import hashlib
import os
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar

from conf.errors import Problem, RequestError, did_you_mean
from conf.rules_data import nearest_path
from conf.schema import DataConfig, SourceConfig
from recipes.data.changes import DROPPED, PASSED_OVER
from recipes.data.readers import DELIMITERS, delimiter, first_columns, read_document, read_python, read_records
from recipes.data.rows import Fields, Meter, Problems, Row, column_keys, missing_columns, text_fields
from recipes.data.streams import COMPRESSED, BrokenFileError, FileFormat, open_bytes
from recipes.data.values import assigned

SUFFIXES = {"jsonl": (".jsonl", ".ndjson", ".json"), "csv": (".csv", ".tsv"), "parquet": (".parquet",)}
"""What is read of a folder, each also compressed (`.gz`, `.xz`, `.bz2`, `.zst`); text takes all that is not hidden."""
NOT_STDLIB = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "encodings"}
"""Not every distribution installs the library's own tests, and some of them are in broken encodings on purpose; the
tables of `encodings` are generated, and so regular that a held-out split with more of them would look learned."""
FILES_ARE_ROWS = ("stdlib", "text", "images")
"""Kinds of which a file is a row: one that is there twice (a licence, a picture of MNIST) does not make two splits one.
"""
REMEMBERED = 1000
"""Files of which a run remembers the content. Those with the smallest digests: of two folders with the same files they
are the same ones."""


class Source:
    """One source of rows. `key` is its place in the configuration: `data` or `data.mixture[i]`."""

    COUNTED: ClassVar[str] = "rows"
    """What `size` and `Meter.done` count."""

    def __init__(
        self, config: SourceConfig, key: str, held_out: float, max_files: int | None, fields: Fields | None = None
    ):
        self.config, self.key, self.held_out, self.max_files = config, key, held_out, max_files
        self.fields = fields or text_fields(config)

    @property
    def name(self) -> str:
        """What to call this source in messages and reports."""
        return self.config.path or self.config.kind

    def check(self) -> list[Problem]:
        """The cheap part of what can be wrong: files that do not exist or are empty, columns of the first row."""
        raise NotImplementedError

    def fingerprint(self) -> str:
        """Changes whenever the content, or the way it is split, does."""
        raise NotImplementedError

    def origins(self) -> list[str]:
        """What the places of rows begin with (files, training ones first), in an order that names do not change."""
        return []

    def identity(self) -> str:
        """What identifies the training rows and which of them are held out, wherever they are read, packed or not."""
        return self.fingerprint()

    def digests(self, held_out: bool) -> list[str]:
        """What identifies the content of each file of a split, whatever its name; none of rows that are in no files."""
        return []

    def size(self) -> int:
        """The total that `Meter.done` runs up to."""
        raise NotImplementedError

    def read_so_far(self, meter: Meter, doing: str) -> tuple[int, int, str]:
        """(done, total, what is being done and what is counted), for a `Progress`."""
        done = min(meter.done, meter.total)
        if self.COUNTED != "bytes":
            return done, meter.total, f"{doing} {self.name} ({self.COUNTED})"
        unit, size = ("kB", 1000) if meter.total < 10_000_000 else ("MB", 1_000_000)
        return -(-done // size), -(-meter.total // size), f"{doing} {self.name} ({unit})"

    def in_both_splits(self, others: Sequence[Source] = ()) -> Problem | None:
        """What is held out here and trained on here, or by one of the other sources. Raises what `files` does."""
        return None

    def read(self, problems: Problems, meter: Meter) -> Iterator[Row]:
        """All rows of both splits, read lazily and always in the same order."""
        raise NotImplementedError


class FileSource(Source):
    """Files of `path` (both splits), or of `path` (training) and `eval_path` (held out)."""

    COUNTED = "bytes"

    @property
    def form(self) -> FileFormat:
        return FileFormat.of(self.config, self.key)

    def in_both_splits(self, others: Sequence[Source] = ()) -> Problem | None:
        trained = {
            _identity(path): source.key
            for source in (self, *others) if isinstance(source, FileSource) for _, path in source.files(False)
        }  # fmt: skip
        for name, path in self.files(True):
            if key := trained.get(_identity(path)):
                rule = f"{name} is among the training files of {key}.path, too: held-out rows would be learned"
                return Problem(f"{self.key}.eval_path", str(self.config.eval_path), rule, "files of its own, or null")
        return self._same_content(others) if self.config.eval_path is not None else None

    def _same_content(self, others: Sequence[Source]) -> Problem | None:
        """The same for files that have another name, or are packed."""
        known = {
            content: (source, path)
            for source in (self, *others) if isinstance(source, FileSource)
            for path in source.inputs(False) if (content := source.content(path))
        }  # fmt: skip
        mine = [(path, content) for path in self.inputs(True) if (content := self.content(path))]
        same = [(path, *known[content]) for path, content in mine if content in known]
        if not overlaps(self.config.kind, len(same), len(mine)):
            return None
        path, source, other = same[0]
        rule = f"{path} holds what {other} holds, of {source.key}.path: held-out rows would be learned"
        return Problem(f"{self.key}.eval_path", str(self.config.eval_path), rule, "files of its own, or null")

    def inputs(self, held_out: bool) -> list[Path]:
        """The files of a split whose content tells rows apart: not those of labels alone."""
        return [path for _, path in self.files(held_out)]

    def content(self, path: Path) -> str:
        """What identifies the content of a file, packed or not; empty where it has none."""
        status = path.stat()
        return _content(path, self.form, status.st_size, status.st_mtime_ns, status.st_ino)

    def identity(self) -> str:
        files = self.files(False)
        parts = [(name if len(files) > 1 else "", self.content(path)) for name, path in files]  # as in `fingerprint`
        return f"{type(self).__name__} {parts}"

    def digests(self, held_out: bool) -> list[str]:
        return sorted({content for path in self.inputs(held_out) if (content := self.content(path))})[:REMEMBERED]

    def check(self) -> list[Problem]:
        problems = Problems()
        try:
            for name, value in (("path", self.config.path), ("eval_path", self.config.eval_path)):
                if name == "path" or value is not None:
                    self._check_files(name, value, problems)
        except RequestError as error:
            return error.problems
        return problems.found

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for held_out in (False, True):
            files = self.files(held_out)
            for name, path in files:
                # Names decide about the order of several files, and which are held out.
                name = name if len(files) > 1 else ""
                digest.update(f"{held_out}\0{name}\0{path.stat().st_size}\0".encode("utf-8", "surrogateescape"))
                with path.open("rb") as file:
                    while block := file.read(1 << 20):
                        digest.update(block)
        return digest.hexdigest()

    def origins(self) -> list[str]:
        return [str(path) for held_out in (False, True) for _, path in self.files(held_out)]

    def size(self) -> int:
        return sum(path.stat().st_size for held_out in (False, True) for _, path in self.files(held_out))

    def files(self, held_out: bool) -> list[tuple[str, Path]]:
        """(relative path, file) of `path` or of `eval_path`, sorted; empty for an `eval_path` that is not set."""
        if held_out and self.config.eval_path is None:
            return []
        name, value = ("eval_path", self.config.eval_path) if held_out else ("path", self.config.path)
        return find_files(self.config.kind, f"{self.key}.{name}", value, self.max_files)

    def _check_files(self, name: str, value: str | None, problems: Problems) -> None:
        key = f"{self.key}.{name}"
        try:
            files = find_files(self.config.kind, key, value, self.max_files)
        except RequestError as error:
            problems.found += error.problems
            return
        try:
            if all(path.stat().st_size == 0 for _, path in files):
                problems.add(Problem(key, str(value), "there are no bytes in it", "a file with at least two documents"))
            else:
                self._check_content(key, str(value), [path for _, path in files], problems)
        except OSError as error:
            problems.add(Problem(key, str(value), f"cannot be read ({error.strerror})"))

    def _check_content(self, key: str, value: str, paths: list[Path], problems: Problems) -> None:
        """Look into the files, cheaply."""


class DocumentSource(FileSource):
    """One document per file (text); the held-out split is by file, or by lines when there is only one."""

    def read(self, problems: Problems, meter: Meter) -> Iterator[Row]:
        train, evaluation = self.files(False), self.files(True)
        if not evaluation and len(train) == 1:
            yield from self._read_lines(train[0][1], problems, meter)
            return
        set_aside = held_out_files([name for name, _ in train], self.held_out) if not evaluation else set()
        for split, files in ((False, train), (True, evaluation)):
            for name, path in files:
                text = self._read_file(path, problems, meter)
                meter.done += path.stat().st_size
                if text:
                    yield Row(str(path), split or name in set_aside, {"text": text})
                elif text is not None:
                    meter.note(PASSED_OVER, "empty files", str(path))

    def _read_file(self, path: Path, problems: Problems, meter: Meter) -> str | None:
        return read_document(path, self.form, problems)

    def _read_lines(self, path: Path, problems: Problems, meter: Meter) -> Iterator[Row]:
        """A single file: its last lines are the held-out document."""
        text = self._read_file(path, problems, meter)
        meter.done += path.stat().st_size
        lines = (text or "").splitlines(keepends=True)
        if len(lines) < 2:
            if text is not None:
                rule = "a single file needs at least two lines, its last ones are held out"
                problems.add(Problem(f"{self.key}.path", str(path), rule, f"{self.key}.eval_path=FILE"))
            return
        cut = len(lines) - min(max(round(self.held_out * len(lines)), 1), len(lines) - 1)
        yield Row(f"{path}:1", False, {"text": "".join(lines[:cut])})
        yield Row(f"{path}:{cut + 1}", True, {"text": "".join(lines[cut:])})


class StdlibSource(DocumentSource):
    """The source files of the running interpreter's standard library, without its tests."""

    def check(self) -> list[Problem]:
        try:
            self.files(False)
        except RequestError as error:
            return error.problems
        return []

    def files(self, held_out: bool) -> list[tuple[str, Path]]:
        if held_out:
            return []
        root = Path(sysconfig.get_path("stdlib"))
        found = []
        for folder, folders, names in os.walk(root):
            folders[:] = [name for name in folders if name not in NOT_STDLIB]
            found += [Path(folder, name) for name in names if name.endswith(".py")]
        files = sorted((path.relative_to(root).as_posix(), path) for path in found)[: self.max_files]
        if len(files) < 2:
            rule = f"{root} has {len(files)} source files, at least two are needed"
            raise RequestError(Problem(f"{self.key}.kind", "stdlib", rule, "data=text data.path=FOLDER"))
        return files

    def _read_file(self, path: Path, problems: Problems, meter: Meter) -> str | None:
        text = read_python(path)
        if text is None:
            meter.note(DROPPED, "files that do not decode", str(path))
        return text


class RecordSource(FileSource):
    """Rows of jsonl, csv and parquet files; the held-out split is by row."""

    def read(self, problems: Problems, meter: Meter) -> Iterator[Row]:
        splits = [(False, self.files(False)), (True, self.files(True))]
        by_row = not splits[1][1]
        index = 0
        for split, files in splits:
            for _, path in files:
                start = meter.done
                for number, content in read_records(path, self.config, self.form, self.fields, problems, meter):
                    held_out = held_out_row(index, self.held_out) if by_row else split
                    yield Row(f"{path}:{number}", held_out, content)
                    index += 1
                meter.done = start + path.stat().st_size

    def _check_content(self, key: str, value: str, paths: list[Path], problems: Problems) -> None:
        if self.config.kind == "csv" and len(delimiter(self.config)) != 1:
            rule = "the delimiter is one character"
            problems.add(Problem(f"{self.key}.delimiter", self.config.delimiter, rule, f"{self.key}.delimiter=','"))
            return
        for path in paths:
            columns = first_columns(path, self.config, self.form, self.fields, problems)
            if problems.found:
                return
            if columns is not None:
                signs = [sign for sign in DELIMITERS if len(columns) == 1 and sign in str(columns[0])]
                if self.config.kind == "csv" and signs:
                    rule = f"{path} has one column: {columns[0]}"
                    near = f"{self.key}.delimiter='{signs[0]}'".replace("\t", "\\t")
                    problems.add(Problem(f"{self.key}.delimiter", self.config.delimiter, rule, near))
                    return
                problems.found += missing_columns(self.fields, self.key, columns, str(path))
                return
        problems.add(Problem(key, value, "there are no rows in it", "a file with at least two rows"))


def open_source(config: SourceConfig, key: str, data: DataConfig) -> Source:
    """The reader of one source; `data` gives `held_out` and `max_files`. Raises RequestError for an unknown kind."""
    from recipes.data.hub import HubSource

    kinds = {"stdlib": StdlibSource, "text": DocumentSource, "hub": HubSource}
    kinds |= dict.fromkeys(SUFFIXES, RecordSource)
    if config.kind not in kinds:
        nearest = did_you_mean(config.kind, kinds)
        rule = f"one of {', '.join(kinds)}"
        raise RequestError(Problem(f"{key}.kind", config.kind, rule, f"{key}.kind={nearest}" if nearest else ""))
    by_file = config.kind in ("stdlib", "text")
    return kinds[config.kind](config, key, data.held_out, data.max_files if by_file else None)


def open_sources(data: DataConfig) -> list[Source]:
    """The sources of `data.mixture`, or the single one that `data` itself describes."""
    if data.mixture:
        return [open_source(config, f"data.mixture[{i}]", data) for i, config in enumerate(data.mixture)]
    return [open_source(data, "data", data)]


def check(data: DataConfig) -> list[Problem]:
    """Everything about the data that shows without reading all of it: missing and empty files, missing columns.

    Takes a fraction of a second and imports neither torch nor `datasets`.
    """
    try:
        sources = open_sources(data)
    except RequestError as error:
        return error.problems
    problems = []
    for source in sources:
        asked = column_keys(source.config)
        missing = [name for name, column in asked.items() if not column]
        rule = "prompt and completion are given together"
        problems += [Problem(f"{source.key}.{name}", "null", rule, f"{source.key}.{name}=COLUMN") for name in missing]
        if not missing:
            problems += source.check()
    return problems


def rows(source: Source, held_out: bool, problems: Problems, meter: Meter) -> Iterator[Row]:
    """The training or the held-out rows of a source, read lazily."""
    return (row for row in source.read(problems, meter) if row.held_out == held_out)


def _identity(path: Path) -> tuple[int, int]:
    """The same for all names of a file, links of both kinds."""
    status = path.stat()
    return status.st_dev, status.st_ino


@functools.lru_cache(1 << 16)
def _content(path: Path, form: FileFormat, size: int, modified: int, inode: int) -> str:
    """What identifies the unpacked bytes of a file; of one that is damaged, the bytes that are there."""
    if not size:
        return ""
    digest = hashlib.sha256()
    stream, raw = open_bytes(path, form)
    with raw, stream:
        try:
            while block := stream.read(1 << 20):
                digest.update(block)
        except BrokenFileError:
            raw.seek(0)
            digest = hashlib.file_digest(raw, "sha256")  # type: ignore[arg-type]
    return digest.hexdigest()[:16]


def overlaps(kind: str, same: int, files: int) -> bool:
    """Whether files of a kind of which so many are known hold rows that are known."""
    return 2 * same >= files > 0 if kind in FILES_ARE_ROWS else same > 0


def held_out_row(index: int, share: float) -> bool:
    """Whether row `index` is held out. Row 0 always is and row 1 never, so that two rows are enough for two splits."""
    return index == 0 or (index > 1 and _hash(str(index)) < share)


def held_out_files(names: list[str], share: float) -> set[str]:
    """The files whose hashed name falls below `share`; at least one and not all of them."""
    ranked = sorted(names, key=_hash)
    count = sum(_hash(name) < share for name in names)
    return set(ranked[: min(max(count, 1), len(names) - 1)])


def find_files(kind: str, key: str, value: str | None, max_files: int | None) -> list[tuple[str, Path]]:
    """(relative path, file) of a file, a folder or a glob (`**` crosses folders), sorted by relative path.

    Raises RequestError when nothing is found, naming the nearest path that exists.
    """
    if value is None:
        raise RequestError(Problem(key, "null", f"{kind} data needs a path", f"{key}=FILE, FOLDER or 'FOLDER/**/*'"))
    path = Path(value).expanduser()
    if path.is_file():
        return [(path.name, path)]
    if path.is_dir():
        try:
            found = sorted(file for file in _below(path) if _wanted(kind, file, path))
        except OSError as error:
            raise RequestError(Problem(key, value, f"{error.filename} cannot be read ({error.strerror})")) from None
        if not found:
            wanted = " ".join(SUFFIXES.get(kind, ("any file",)))
            raise RequestError(
                Problem(key, value, f"the folder has no file to read ({wanted})", assigned(key, f"{value}/*"))
            )
        root = path
    else:
        found = sorted(Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file())
        if not found:
            raise RequestError(_nothing_there(key, value, path))
        root = Path(os.path.commonpath([file.parent for file in found]))
    return [(file.relative_to(root).as_posix(), file) for file in found][:max_files]


def _below(folder: Path, above: tuple[str, ...] = ()) -> Iterator[Path]:
    """All files in a folder, through links to other folders too, but not those that lead back."""
    real = os.path.realpath(folder)
    if real in above:
        return
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.name.startswith("."):
            yield from _below(entry, (*above, real))
        elif entry.is_file():
            yield entry


def _wanted(kind: str, file: Path, root: Path) -> bool:
    if any(part.startswith(".") for part in file.relative_to(root).parts):
        return False
    name = file.stem if file.suffix in COMPRESSED else file.name
    return kind not in SUFFIXES or name.endswith(SUFFIXES[kind])


def _nothing_there(key: str, value: str, path: Path) -> Problem:
    if glob.has_magic(value):
        return Problem(key, value, "no file matches this pattern", f"{key}='FOLDER/**/*' (quoted)")
    found = nearest_path(path)
    nearest = f"a path below {found.resolve()}" if found in path.parents else assigned(key, str(found))
    return Problem(key, value, "there is no such file or folder", nearest)


def _hash(name: str) -> float:
    """A number in [0, 1) that depends on nothing but the name."""
    return (
        int.from_bytes(hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest(), "big") / 2**64
    )
