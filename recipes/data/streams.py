"""The content of a data file: decompressed, in UTF-8 whatever its encoding is, and never much more than the file is."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from conf.errors import Problem
from conf.schema import SourceConfig

MAGIC = {"gzip": b"\x1f\x8b", "xz": b"\xfd7zXZ\x00", "bzip2": b"BZh", "zstd": b"\x28\xb5\x2f\xfd"}
COMPRESSED = (".gz", ".xz", ".bz2", ".zst")
"""What names of such files end with; their first bytes decide."""
FREE_BYTES = 64 << 20
"""So much any file may hold: a ratio says nothing about small ones."""
BLOCK = 1 << 16
ENOUGH = 20
"""Letters that are not UTF-8 by chance; two or three may be."""


class BrokenFileError(Exception):
    """A file whose content cannot be read to its end. line: where that shows; 0: of the whole file."""

    def __init__(self, rule: str, nearest: str = "", line: int = 0):
        super().__init__(rule)
        self.rule, self.nearest, self.line = rule, nearest, line

    def problem(self, path: Path) -> Problem:
        return Problem(f"{path}:{self.line}" if self.line else str(path), "", self.rule, self.nearest)


@dataclass(frozen=True)
class FileFormat:
    """How the files of a source are meant. key: the source's place in the configuration."""

    key: str = "data"
    encoding: str = SourceConfig.encoding
    max_expansion: float = SourceConfig.max_expansion

    @classmethod
    def of(cls, source: SourceConfig, key: str = "data") -> FileFormat:
        return cls(key, source.encoding, source.max_expansion)

    @property
    def is_utf8(self) -> bool:
        return codecs.lookup(self.encoding).name in ("utf-8", "utf-8-sig")


def open_bytes(path: Path, form: FileFormat) -> tuple[IO[bytes], IO[bytes]]:
    """(decompressed stream, raw file): the position of the raw file tells how far reading has come.

    Reading the stream raises BrokenFileError; the two are the same for a file that is not compressed.
    """
    raw = path.open("rb")
    start = raw.read(10)
    raw.seek(0)
    kind = next((kind for kind, magic in MAGIC.items() if start.startswith(magic)), None)
    if kind is None or (kind == "bzip2" and start[4:] != b"1AY&SY"):
        return raw, raw
    return io.BufferedReader(_Decompressed(raw, kind, path, form), BLOCK), raw


def open_text(path: Path, form: FileFormat) -> tuple[IO[bytes], IO[bytes]]:
    """The same as UTF-8, which is not looked at where the file is said to be in it."""
    stream, raw = open_bytes(path, form)
    return (stream if form.is_utf8 else io.BufferedReader(_Utf8(stream, form), BLOCK)), raw


class _Decompressed(io.RawIOBase):
    """The content of a compressed file, as long as it is in proportion to the file."""

    def __init__(self, raw: IO[bytes], kind: str, path: Path, form: FileFormat):
        self._kind, self._form, self._size, self._count = kind, form, path.stat().st_size, 0
        self._stream = _decompressor(raw, kind)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        try:
            block = self._stream.read(len(buffer))
        except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
            if isinstance(error, OSError) and error.errno is not None:  # of the disk
                raise
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise BrokenFileError(f"the {self._kind} file is damaged ({reason})") from error
        self._count += len(block)
        refuse_expansion(self._count, self._size, self._form)
        buffer[: len(block)] = block
        return len(block)


def refuse_expansion(content: int, size: int, form: FileFormat) -> None:
    """Raise BrokenFileError where a file of `size` bytes holds so many that it must have been made to."""
    if content > FREE_BYTES and content > form.max_expansion * size:
        rule = f"its {size} bytes hold more than {form.max_expansion:g} times as many ({form.key}.max_expansion)"
        more = f"{form.key}.max_expansion={max(2 * form.max_expansion, 2000):g}"
        raise BrokenFileError(rule, f"{more} for a file that you know")


def _decompressor(raw: IO[bytes], kind: str) -> IO[bytes]:
    if kind == "zstd":  # Python has it from 3.14 on
        import pyarrow

        return pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, mode="r"), "zstd")
    reader = {"gzip": gzip.GzipFile, "xz": lzma.LZMAFile, "bzip2": bz2.BZ2File}[kind]
    return reader(fileobj=raw) if kind == "gzip" else reader(raw)  # type: ignore[call-overload, return-value]


class _Utf8(io.RawIOBase):
    """A stream in another encoding, decoded piece by piece: what follows reads UTF-8 alone."""

    def __init__(self, stream: IO[bytes], form: FileFormat):
        self._stream, self._form = stream, form
        self._decoder = codecs.getincrementaldecoder(form.encoding)()
        self._ready, self._taken, self._line, self._started = b"", 0, 1, False
        self._doubt: codecs.IncrementalDecoder | None = codecs.getincrementaldecoder("utf-8")()
        self._foreign = 0

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._stream.close()
        super().close()

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        block = b"more"
        while block and not self._ready:
            block = self._stream.read(BLOCK)
            text = self._decoded(block)
            self._refuse_utf8(block)
            self._line += text.count("\n")
            if text and not self._started:
                self._started, text = True, text.removeprefix("\ufeff")
            self._ready = text.encode()
        piece, self._ready = self._ready[: len(buffer)], self._ready[len(buffer) :]
        buffer[: len(piece)] = piece
        return len(piece)

    def _refuse_utf8(self, block: bytes) -> None:
        """A whole file of UTF-8 is in no other encoding: each of its letters would become two or three."""
        if self._doubt is None:
            return
        try:
            text = self._doubt.decode(block, final=not block)
        except UnicodeDecodeError:
            self._doubt = None
            return
        self._foreign += len(text) - len(text.encode("ascii", "ignore"))
        if not block and self._foreign >= ENOUGH:
            rule = f"its {self._foreign} letters beyond ASCII are UTF-8, not {self._form.encoding}"
            raise BrokenFileError(f"{rule} ({self._form.key}.encoding)", f"{self._form.key}.encoding=utf-8")

    def _decoded(self, block: bytes) -> str:
        state = self._decoder.getstate()
        try:
            text = self._decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            waiting = len(error.object) - len(block)  # bytes of a character whose beginning was in the last block
            before = codecs.getincrementaldecoder(self._form.encoding)()
            before.setstate(state)
            line = self._line + before.decode(block[: max(0, error.start - waiting)]).count("\n")
            place = f"byte {self._taken - waiting + error.start} of the file"
            rule = f"not valid {self._form.encoding}: byte 0x{error.object[error.start]:02x} at {place}"
            key = f"{self._form.key}.encoding"
            raise BrokenFileError(f"{rule} ({key})", f"{key}=utf-8, or what it is in", line) from error
        except UnicodeError as error:  # UTF-16 without its mark, where the codec says no place
            raise BrokenFileError(f"not valid {self._form.encoding}: {error} ({self._form.key}.encoding)") from error
        self._taken += len(block)
        return text


def broken_utf8(where: str, error: UnicodeDecodeError, position: str, form: FileFormat) -> Problem:
    """What is said of bytes that are not UTF-8. position: of the byte, in words."""
    rule = f"not valid UTF-8: byte 0x{error.object[error.start]:02x} at {position}"
    key = f"{form.key}.encoding"
    if error.object.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return Problem(where, "", f"{rule}; the file begins as UTF-16 does", f"{key}=utf-16")
    return Problem(where, "", rule, f"{key}=cp1252, or what the file is in; or iconv -f ENCODING -t UTF-8")
