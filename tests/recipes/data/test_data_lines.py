"""Line-aligned text: the real files, the split, and sides that do not fit together."""

from __future__ import annotations

import gzip

import pytest

from conf.errors import RequestError
from recipes.data.lines import LinesSource, count_lines
from recipes.data.rows import Meter, Problems
from recipes.data.streams import FileFormat


def source(data) -> LinesSource:
    return LinesSource(data, "data", data.held_out, None)


def read(data, meter=None):
    """(training rows, held-out rows)."""
    problems = Problems()
    found = list(source(data).read(problems, meter or Meter()))
    problems.raise_any()
    return [row for row in found if not row.held_out], [row for row in found if row.held_out]


def refused(data) -> str:
    with pytest.raises(RequestError) as caught:
        read(data)
    return caught.value.render()


def checked(data) -> str:
    return "\n".join(map(str, source(data).check()))


def texts(rows) -> list[tuple[str, str]]:
    return [(row.content["source"], row.content["target"]) for row in rows]


@pytest.fixture
def aligned(write, config):
    """aligned(left, right, **keys) → configuration of two files with these contents."""

    def aligned(left: str | bytes, right: str | bytes, **keys):
        paths = {"path": str(write("a.en", left)), "target_path": str(write("a.fr", right))}
        return config(kind="lines", **paths | keys)

    return aligned


# The real files


def test_multi30k(shared, config):
    sides = ("path", "target_path", "eval_path", "eval_target_path")
    names = ("train.en", "train.fr", "val.en", "val.fr")
    paths = {side: shared(f"multi30k/{name}.gz") for side, name in zip(sides, names, strict=True)}
    data = config(kind="lines", **{side: str(path) for side, path in paths.items()})
    assert checked(data) == ""
    meter = Meter()
    train, held_out = read(data, meter)
    assert (len(train), len(held_out)) == (29_000, 1_014) and not meter.counts
    assert meter.done == source(data).size() == sum(path.stat().st_size for path in paths.values())
    lines = {side: gzip.decompress(path.read_bytes()).decode().split("\n") for side, path in paths.items()}
    assert texts(train) == list(zip(lines["path"][:-1], lines["target_path"][:-1], strict=True))
    assert texts(held_out) == list(zip(lines["eval_path"][:-1], lines["eval_target_path"][:-1], strict=True))
    assert train[-1].where == f"{paths['path']}:29000"


def test_multi30k_without_eval_path(shared, config):
    paths = [str(shared(f"multi30k/test_2016_flickr.{side}.gz")) for side in ("en", "fr")]
    data = config(kind="lines", path=paths[0], target_path=paths[1], held_out=0.1)
    train, held_out = read(data)
    assert len(train) + len(held_out) == 1000 and 70 < len(held_out) < 130
    assert texts(held_out) == texts(read(data)[1])


def test_real_sides_of_different_splits(shared, config):
    paths = [shared("multi30k/val.en.gz"), shared("multi30k/test_2016_flickr.fr.gz")]
    message = refused(config(kind="lines", path=str(paths[0]), target_path=str(paths[1])))
    assert f"{paths[0]}: it has 1014 lines, its translation {paths[1]} has 1000" in message


# Lines


@pytest.mark.parametrize("end", ["", "\n"])
def test_two_rows_are_enough_for_two_splits(aligned, end):
    train, held_out = read(aligned("one\ntwo" + end, "un\ndeux"))
    assert (texts(held_out), texts(train)) == ([("one", "un")], [("two", "deux")])
    assert train[0].where.endswith("a.en:2")


def test_only_line_feeds_end_a_line(aligned):
    train, held_out = read(aligned("\ufeffa\u2028b\x0c\r\n c \n", "x\u0085y\nz\r\n"))
    assert texts(held_out + train) == [("a\u2028b\x0c", "x\u0085y"), (" c ", "z")]


def test_pairs_with_an_empty_side_are_counted(aligned):
    meter = Meter()
    train, held_out = read(aligned("a\n\nc\n d\n\ne\n", "1\n2\n \n4\n\n5\n"), meter)
    assert sorted(texts(held_out + train)) == [(" d", "4"), ("a", "1"), ("e", "5")]
    assert meter.counts == {"rows without 'source'": 1, "rows without 'target'": 1, "empty rows": 1}


def test_folders_are_paired_file_by_file(write, config, tmp_path):
    for name in ("en/1", "en/2", "fr/1", "fr/2"):
        write(f"{name}.txt", f"{name} a\n{name} b\n")
    data = config(kind="lines", path=str(tmp_path / "en"), target_path=str(tmp_path / "fr"), held_out=0.5)
    train, held_out = read(data)
    pairs = texts(train) + texts(held_out)
    assert len(pairs) == 4 and all(left.replace("en", "fr") == right for left, right in pairs)
    write("fr/3.txt", "more\n")
    assert "data.target_path" in checked(data) and "3 files, data.path has 2" in checked(data)
    assert "3 files, data.path has 2" in refused(data)


# Wrong files


@pytest.mark.parametrize(("left", "right"), [("a\nb\nc\n", "1\n2\n"), ("a\nb", "1\n2\n3"), ("a\nb\n", "1\n2\n\n")])
def test_sides_of_different_length(aligned, left, right):
    data = aligned(left, right)
    counts = [text.count("\n") + (not text.endswith("\n")) for text in (left, right)]
    problems, meter = Problems(), Meter()
    assert list(source(data).read(problems, meter)) == []  # found before any row is used
    (problem,) = problems.found
    assert problem.key == data.path
    assert f"it has {counts[0]} lines, its translation {data.target_path} has {counts[1]}" in problem.rule


def test_lines_that_do_not_decode_move_nothing(aligned):
    data = aligned(b"a\n\xff\nc\nd\ne\n", b"1\n2\n\xfe\n\xfe4\n5\n")
    problems = Problems()
    assert texts(source(data).read(problems, Meter())) == [("a", "1"), ("e", "5")]
    assert sorted(problem.key for problem in problems.found) == [
        f"{data.path}:2",
        f"{data.target_path}:3",
        f"{data.target_path}:4",
    ]
    data = aligned(b"a\nb\n\xff\n", b"1\n2\n\xfe\n")
    message = refused(data)
    assert f"{data.path}:3: not valid UTF-8" in message and f"{data.target_path}:3: not valid UTF-8" in message


def test_damaged_gzip(aligned):
    zipped = gzip.compress("".join(f"line {i * 7919}\n" for i in range(5000)).encode())
    data = aligned(zipped[: len(zipped) // 2], "1\n" * 5000)
    message = refused(data)
    assert f"{data.path}: the gzip file is damaged" in message and message.count("the gzip") == 1
    assert "lines" not in message  # how many it had is not known


def test_line_counts(write):
    for content, count in (("", 0), ("\n", 1), ("a", 1), ("a\n", 1), ("a\n\n", 2), ("a\nb", 2)):
        assert count_lines(write("count.txt", content), FileFormat(), Problems()) == count
        assert count_lines(write("count.txt.gz", content), FileFormat(), Problems()) == count


def test_check_names_the_missing_side(aligned, config):
    assert "data.target_path=null" in checked(aligned("a", "b", target_path=None))
    assert "data.path=null" in checked(aligned("a", "b", path=None))
    assert "data.target_path=missing.fr: there is no such file" in checked(aligned("a", "b", target_path="missing.fr"))
    assert "data.eval_target_path=null" in checked(aligned("a", "b", eval_path=__file__))
    assert "data.eval_path=null" in checked(aligned("a", "b", eval_target_path=__file__))
    assert "no bytes" in checked(aligned("a", ""))
    message = checked(config(kind="lines"))
    assert "data.path=null" in message and "data.target_path=null" in message and "eval" not in message
    assert checked(aligned("a", "b")) == ""


def test_the_fingerprint_sees_both_sides(aligned):
    prints = [source(aligned(*sides)).fingerprint() for sides in (("a\nb", "1\n2"), ("a\nb", "1\n3"), ("1\n2", "a\nb"))]
    assert len(set(prints)) == 3 and source(aligned("a\nb", "1\n2")).fingerprint() == prints[0]
