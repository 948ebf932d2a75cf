"""Encodings, compression, and files that hold far more than they are."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma

import numpy as np
import pytest

from conf.errors import RequestError
from recipes.data import streams
from recipes.data.conll import ConllSource
from recipes.data.images import ImageFolderSource, pixels
from recipes.data.lines import LinesSource
from recipes.data.rows import Meter, Problems
from recipes.data.sources import open_source
from recipes.data.squad import SquadSource

TEXT = "Grün und naïve Café-Gäste\n日本語のテキスト\nund ещё\n"
WESTERN = "Grün und naïve\nCafé-Gäste: 5 £\nçà et là\n"
UNICODE, SINGLE = ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32", "gb18030"), ("cp1252", "latin-1", "cp500")
ARTICLE = {"title": "é", "paragraphs": [{"context": "Où? Là.", "qas": [
    {"id": str(n), "question": "Où?", "answers": [{"text": "Là", "answer_start": 4}]} for n in range(4)]}]}  # fmt: skip


def contents(kind: str, text: str) -> str:
    lines = text.splitlines()
    return {
        "text": text,
        "jsonl": "".join(json.dumps({"text": line}, ensure_ascii=False) + "\n" for line in lines),
        "csv": "text\n" + text,
        "conll": "".join(f"{line.replace(' ', '_')} O\n\n" for line in lines),
        "lines": text,
        "squad": json.dumps({"data": [ARTICLE]}, ensure_ascii=False),
    }[kind]


def read(config, path, kind: str, **keys):
    """What the rows of a file hold, and what is wrong."""
    data = config(kind=kind, path=str(path), target_path=str(path) if kind == "lines" else None, **keys)
    special = {"conll": ConllSource, "lines": LinesSource, "squad": SquadSource}
    source = special[kind](data, "data", 0.2, None) if kind in special else open_source(data, "data", data)
    problems = Problems()
    try:
        found = source.check()
        rows = [row.content for row in source.read(problems, Meter())] if not found else []
    except RequestError as error:
        return [], str(error)
    return rows, "\n".join(map(str, [*found, *problems.found]))


@pytest.mark.parametrize("kind", ["text", "jsonl", "csv", "conll", "lines", "squad"])
def test_an_encoding_changes_no_row(kind, write, config):
    for text, encodings in ((TEXT, UNICODE), (WESTERN, SINGLE)):
        whole = contents(kind, text)
        if kind == "squad" and encodings is UNICODE:
            whole = whole.replace("Où?", "何処?")
        expected, problems = read(config, write("plain", whole), kind)
        assert expected and not problems
        for encoding in encodings:
            said = {} if encoding.startswith("utf-8") else {"encoding": encoding}  # a mark before UTF-8 is no character
            assert read(config, write("encoded", whole.encode(encoding)), kind, **said) == (expected, ""), encoding
    marked = write("marked", ("\ufeff" + whole).encode("utf-16-le"))
    assert read(config, marked, kind, encoding="utf-16-le") == (expected, "")


@pytest.mark.parametrize("kind", ["text", "jsonl", "csv", "conll", "lines", "squad"])
def test_a_wrong_byte_is_refused_where_it_is(kind, write, config):
    whole = contents(kind, WESTERN).encode()
    at = whole.index("à".encode())
    line = whole.count(b"\n", 0, at) + 1
    path = write("rows", whole[:at] + b"\xe0" + whole[at + 2 :])
    said = read(config, path, kind)[1]
    assert f"{path}:{line}: not valid UTF-8: byte 0xe0 at byte" in said and f"{at} of the file" in said
    assert "data.encoding=cp1252" in said
    at = whole.index("à".encode()) + 1  # 0xa0: no ASCII
    said = read(config, path, kind, encoding="ascii")[1]
    first = next(place for place, byte in enumerate(path.read_bytes()) if byte > 127)
    assert f"not valid ascii: byte 0xc3 at byte {first} of the file (data.encoding)" in said, said
    assert f"{path}:{path.read_bytes().count(bytes([10]), 0, first) + 1}" in said


def test_places_far_into_a_file(write, config, monkeypatch):
    """Also where a character is cut by the end of a block."""
    text = "é😀\n" * 60
    for block in (7, 16, 1 << 16):
        monkeypatch.setattr(streams, "BLOCK", block)
        for encoding, wrong in (("utf-16", b"\x00\xdc"), ("gb18030", b"\xff"), ("shift_jis", b"\xfd")):
            usable = text if encoding != "shift_jis" else "日本\n" * 60
            before = usable.encode(encoding)
            path = write("text", before + wrong + "b\n".encode(encoding)[-4 if encoding == "utf-16" else 0 :])
            said = read(config, path, "text", encoding=encoding)[1]
            assert f"{path}:61: not valid {encoding}: byte" in said and f"byte {len(before)} of the file" in said, said
    path = write("text", "one\ntwo\n".encode("utf-16"))
    assert "begins as UTF-16" in (said := read(config, path, "text")[1]) and "data.encoding=utf-16" in said


def test_utf8_is_not_read_as_something_else(write, config):
    """Every byte has a meaning in Latin-1; what comes out is no text."""
    path = write("rows.csv", contents("csv", WESTERN * 5))
    for encoding in ("latin-1", "cp1252"):
        said = read(config, path, "csv", encoding=encoding)[1]
        assert f"{path}: its " in said and f"are UTF-8, not {encoding} (data.encoding)" in said, said
        assert "data.encoding=utf-8" in said
    few = write("few.csv", "text\nplain\nÃ©\nmore\n".encode("latin-1"))  # which is é in UTF-8
    assert read(config, few, "csv", encoding="latin-1") == ([{"text": t} for t in ("plain", "Ã©", "more")], "")


COMPRESS = {".gz": gzip.compress, ".xz": lzma.compress, ".bz2": bz2.compress}


def zstd(content: bytes) -> bytes:
    import pyarrow

    return pyarrow.compress(content, "zstd", asbytes=True)


@pytest.mark.parametrize("suffix", streams.COMPRESSED)
def test_compressed_files(suffix, tmp_path, config, monkeypatch):
    compress = COMPRESS.get(suffix, zstd)
    whole = contents("jsonl", TEXT).encode()
    (tmp_path / "rows.jsonl").write_bytes(whole)
    expected = read(config, tmp_path / "rows.jsonl", "jsonl")
    (tmp_path / "rows.jsonl").unlink()
    path = tmp_path / f"rows.jsonl{suffix}"
    path.write_bytes(compress(whole) + compress(whole))  # two members, as `cat` makes them
    assert read(config, tmp_path, "jsonl") == (expected[0] * 2, "")
    path.write_bytes(compress(TEXT.encode("utf-16")))
    assert "".join(row["text"] for row in read(config, path, "text", encoding="utf-16")[0]) == TEXT
    noise = np.random.default_rng(0)
    path.write_bytes(compress("".join(f'{{"text": "{noise.bytes(20).hex()}"}}\n' for _ in range(3000)).encode())[:-9])
    said = read(config, path, "jsonl")[1]
    assert "file is damaged" in said and said.count("\n") == 0 and str(path) in said
    monkeypatch.setattr(streams, "FREE_BYTES", 1 << 20)
    path.write_bytes(compress(b"{" + bytes(4 << 20)))
    for kind in ("text", "jsonl", "csv", "squad", "conll", "lines"):
        rows, said = read(config, path, kind)
        assert not rows and f"{path}: its {path.stat().st_size} bytes hold more than 200 times as many" in said, said
        assert "data.max_expansion=2000" in said
    assert "200 times" not in read(config, path, "text", max_expansion=1e9)[1]


def test_parquet_that_holds_far_more_than_it_is(tmp_path, config, monkeypatch):
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "rows.parquet"
    zeros = pyarrow.table({"text": ["0" * 100_000] * 40})
    monkeypatch.setattr(streams, "FREE_BYTES", 1 << 20)
    for options in ({"compression": "zstd", "use_dictionary": False}, {"compression": "zstd", "use_dictionary": True}):
        pyarrow.parquet.write_table(zeros, path, **options)
        rows, said = read(config, path, "parquet")
        assert not rows and f"{path}: its" in said and "data.max_expansion" in said
    assert read(config, path, "parquet", max_expansion=1e9)[0]


def test_images_of_too_many_pixels(tmp_path, config):
    from PIL import Image

    for number in range(4):
        (tmp_path / "data" / str(number % 2)).mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8)).save(tmp_path / "data" / str(number % 2) / f"{number}.png")
    bomb = tmp_path / "data" / "1" / "9.png"
    Image.new("1", (20_000, 20_000)).save(bomb)
    problems = Problems()
    source = ImageFolderSource(config(kind="images", path=str(tmp_path / "data")), "data", 0.2, None)
    rows = list(source.read(problems, Meter()))
    assert len(rows) == 4 and f"{bomb}: 20000 × 20000 pixels, more than data.max_pixels=64000000" in str(
        problems.found[0]
    )
    with pytest.raises(streams.BrokenFileError, match=r"more than data\.max_pixels"):
        pixels(io.BytesIO(bomb.read_bytes()), 64_000_000)
    assert pixels(bomb.parent / "1.png", 64).shape == (8, 8, 1)
