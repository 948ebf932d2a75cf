"""Files that are not what they are read as: what is left of a download, what a browser saved, what an attacker made."""

from __future__ import annotations

import gzip
import io
import json
import lzma
import os
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

KINDS = ("jsonl", "csv", "parquet", "conll", "squad", "lines", "idx", "images")
"""Readers of files; `text` takes what these refuse."""
PAGE = b"<!DOCTYPE html>\n<html><head><title>404</title></head>\n<body>Not, found</body></html>\n"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
NOISE = bytes((number * 193 + number // 7) % 256 for number in range(5000))


def parquet(columns: int = 1) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = io.BytesIO()
    pq.write_table(pa.table({f"c{number}": ["x"] * 50 for number in range(columns)}), file)
    return file.getvalue()


def png(width: int, height: int) -> bytes:
    """A header of any size over a picture of nothing."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


ANY: dict[str, bytes] = {
    "of no bytes": b"",
    "of null characters": b"\0" * 4096,
    "noise": NOISE,
    "a pointer of Git LFS": POINTER,
    "a page of the web": PAGE,
    "half a gzip": gzip.compress(NOISE * 20)[:-40],
    "a gzip of nothing": gzip.compress(b""),
    "half an xz": lzma.compress(NOISE * 20)[:-40],
    "a zip": b"PK\x03\x04" + NOISE[:500],
    "a program": b"\x7fELF\x02\x01\x01" + NOISE[:500],
    "a pickle": b"cposix\nsystem\n(S'touch hacked'\ntR.",
}
"""Content that no reader takes, whatever the file is called."""
DEEP = 100_000
OWN: dict[str, dict[str, bytes]] = {
    "jsonl": {
        "a line as deep as a well": b'{"text": ' + b"[" * DEEP + b"]" * DEEP + b"}\n",
        "numbers without end": b'{"text": 1' + b"0" * 100_000 + b"}\n",
        "not a number": b'{"text": NaN}\n{"text": Infinity}\n',
        "half a character": b'{"text": "\\ud800"}\n' * 3,
        "a key twice": b'{"text": "a", "text": "b"}\n' * 3,
        "no object": b'"text"\n1\nnull\n',
        "half a line": b'{"text": "a"}\n{"text": "b',
        "another column": b'{"body": "a"}\n{"body": "b"}\n',
    },
    "csv": {
        "a quote that never ends": b'text\n"' + b"a\n" * 50_000,
        "a header alone": b"text\n",
        "ragged rows": b"text,label\na\nb,c,d\n",
        "another separator": b"id;text;label\n1;a;b\n",
        "a column twice": b"text,text\na,b\n",
        "a field of megabytes": b"text\n" + b"a" * 200_000 + b"\n\0\n",
    },
    "parquet": {
        "half of one": parquet()[:-100],
        "its ends without a middle": b"PAR1" + b"\xff\xff\xff\x7f" + b"PAR1",
        "another column": parquet(),
        "a byte in its schema": parquet().replace(b"c0", b"\xff\xfe"),
    },
    "conll": {
        "one column": b"word\nword\n\nword\n\n",
        "columns that come and go": b"a O\nb\n\nc O O\n\n",
        "spaces alone": b"   \n \n   \n",
    },
    "squad": {
        "as deep as a well": b"[" * DEEP,
        "a list": b"[]",
        "no articles": b'{"data": []}',
        "articles of text": b'{"data": ["a", "b"]}',
        "an answer elsewhere": json.dumps({"data": [{"title": "t", "paragraphs": [{"context": "c", "qas": [
            {"id": "1", "question": "q", "answers": [{"text": "x", "answer_start": -5}]}]}]}]}).encode(),
        "a place beyond all": json.dumps({"data": [{"title": "t", "paragraphs": [{"context": "c", "qas": [
            {"id": "1", "question": "q", "answers": [{"text": "c", "answer_start": 10**30}]}]}]}]}).encode(),
    },
    "idx": {
        "more images than bytes": struct.pack(">IIII", 2051, 2**31, 2**31, 2**31),
        "no images": struct.pack(">IIII", 2051, 0, 28, 28),
        "labels for images": struct.pack(">II", 2049, 3) + b"\0\1\2",
        "half a header": struct.pack(">II", 2051, 10),
    },
    "images": {
        "a picture of terapixels": png(1_000_000, 1_000_000),
        "half a picture": png(30, 30)[:60],
        "a drawing": b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>',
        "a bitmap of a negative size": b"BM" + struct.pack("<IHHIIiiHH24x", 54, 0, 0, 54, 40, -5, -5, 1, 24),
    },
}  # fmt: skip
SUFFIXES = {"jsonl": ".jsonl", "csv": ".csv", "parquet": ".parquet", "conll": ".conll", "squad": ".json",
            "lines": ".txt", "idx": "", "images": ".png"}  # fmt: skip


def _link(path: Path) -> None:
    path.symlink_to(path)


PLACES: dict[str, Callable[[Path], object]] = {
    "a link to itself": _link, "a pipe": os.mkfifo, "a folder": Path.mkdir,
    "a link to nothing": lambda path: path.symlink_to(path.with_name("nowhere")),
}  # fmt: skip
"""What stands in the place of a file."""


def corpus() -> Iterator[tuple[str, str, bytes | Callable[[Path], object]]]:
    """(kind of reader, what it is, its content or what makes it)."""
    for kind in KINDS:
        yield from ((kind, name, content) for name, content in {**ANY, **OWN.get(kind, {})}.items())
        yield from ((kind, name, make) for name, make in PLACES.items())


def _tokenizer(**changes: object) -> bytes:
    model = {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": [], "unk_token": None}
    whole = {"version": "1.0", "added_tokens": [], "normalizer": None, "pre_tokenizer": None, "post_processor": None,
             "decoder": None, "model": model}  # fmt: skip
    return json.dumps({**whole, **changes}).encode()


TOKENIZERS: dict[str, bytes] = {
    **{name: content for name, content in ANY.items() if "gzip" not in name and "xz" not in name},
    "as deep as a well": b"[" * DEEP,
    "no model": _tokenizer(model=None),
    "a negative number": _tokenizer(model={"type": "BPE", "vocab": {"a": -1}, "merges": []}),
    "a number beyond all": _tokenizer(model={"type": "BPE", "vocab": {"a": 2**70}, "merges": []}),
    "merges of nothing": _tokenizer(model={"type": "BPE", "vocab": {"a": 0}, "merges": [["x", "y"]]}),
    "words in no vocabulary": _tokenizer(model={"type": "WordPiece", "vocab": {}, "unk_token": "[UNK]"}),
    "a kind of tomorrow": _tokenizer(model={"type": "Tomorrow"}),
    "a pattern that is none": _tokenizer(normalizer={"type": "Replace", "pattern": {"Regex": "(a"}, "content": ""}),
}  # fmt: skip
"""In the place of tokenizer.json."""
