"""Rows of every kind, the split, and each way in which data can be wrong."""

from __future__ import annotations

import gzip
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conf.errors import RequestError
from conf.overrides import read_overrides
from conf.schema import DataConfig, SourceConfig
from recipes.data.numbers import LineSource
from recipes.data.readers import read_python
from recipes.data.rows import MAX_PROBLEMS, Fields, Meter, Problems
from recipes.data.sources import RecordSource, check, held_out_files, held_out_row, open_sources, rows
from recipes.data.values import assigned


def read(data: DataConfig):
    """(training rows, held-out rows) of a single source."""
    (source,) = open_sources(data)
    split = []
    for held_out in (False, True):
        problems = Problems()
        split.append(list(rows(source, held_out, problems, Meter())))
        problems.raise_any()
    return split


def texts(split):
    return [row.content["text"] for row in split]


def refused(data: DataConfig) -> str:
    with pytest.raises(RequestError) as caught:
        read(data)
    return caught.value.render()


# Kinds


def test_stdlib_is_split_by_file_and_has_no_tests(config):
    train, held_out = read(config(kind="stdlib", held_out=0.02))
    names = {row.where for row in train} | {row.where for row in held_out}
    assert len(names) == len(train) + len(held_out) > 300
    assert 1 <= len(held_out) < 0.06 * len(names)
    assert not any({"test", "tests", "site-packages", "__pycache__"} & set(Path(name).parts) for name in names)
    assert [row.where for row in train] == sorted((row.where for row in train), key=lambda n: Path(n).as_posix())
    assert Path(train[0].where).read_text("utf-8") == train[0].content["text"]


def test_stdlib_respects_max_files(config):
    train, held_out = read(config(kind="stdlib", max_files=10))
    assert len(train) + len(held_out) == 10 and held_out


def test_python_files_are_read_in_their_declared_encoding(tmp_path):
    path = tmp_path / "latin.py"
    path.write_bytes("# -*- coding: latin-1 -*-\ns = 'é'\n".encode("latin-1"))
    assert "é" in read_python(path)
    path.write_bytes(b"# -*- coding: no-such-codec -*-\n")
    assert read_python(path) is None
    path.write_bytes(b"s = '\xe9'\n")
    assert read_python(path) is None


def test_text_folder_glob_and_gzip(write, config, tmp_path):
    for name in ("a/one.txt", "a/b/two.txt", "a/three.txt.gz", "a/.hidden"):
        write(name, f"content of {name}")
    everything = {f"content of a/{name}" for name in ("one.txt", "b/two.txt", "three.txt.gz")}
    train, held_out = read(config(kind="text", path=str(tmp_path / "a")))
    assert set(texts(train) + texts(held_out)) == everything and held_out and train
    train, held_out = read(config(kind="text", path=str(tmp_path / "a" / "**" / "*.txt")))
    assert set(texts(train) + texts(held_out)) == {"content of a/one.txt", "content of a/b/two.txt"}


def test_a_single_text_file_is_split_at_a_line(shared, config):
    path = shared("tinyshakespeare/input.txt")
    (train,), (held_out,) = read(config(kind="text", path=str(path), held_out=0.1))
    whole = path.read_text("utf-8")
    assert train.content["text"] + held_out.content["text"] == whole
    assert held_out.content["text"].count("\n") == pytest.approx(0.1 * whole.count("\n"), abs=1)
    assert held_out.where == f"{path}:{train.content['text'].count(chr(10)) + 1}"


def test_gzipped_real_text(shared, config):
    path = shared("multi30k/train.en.gz")
    (train,), (held_out,) = read(config(kind="text", path=str(path)))
    assert train.content["text"] + held_out.content["text"] == gzip.decompress(path.read_bytes()).decode()


def test_eval_path_is_the_held_out_split(write, config):
    train_path, eval_path = write("train.jsonl", [{"text": "a"}, {"text": "b"}]), write("eval.jsonl", [{"text": "c"}])
    train, held_out = read(config(kind="jsonl", path=str(train_path), eval_path=str(eval_path)))
    assert (texts(train), texts(held_out)) == (["a", "b"], ["c"])


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_jsonl_rows(write, config, name):
    path = write(name, [{"text": f"row {i}", "other": i} for i in range(100)])
    train, held_out = read(config(kind="jsonl", path=str(path)))
    assert sorted(texts(train) + texts(held_out)) == sorted(f"row {i}" for i in range(100))
    assert train[0].where == f"{path}:2" and held_out[0].where == f"{path}:1"
    assert 8 <= len(held_out) <= 35


def test_csv_rows_with_quotes_and_tabs(write, config):
    path = write("rows.csv", 'q,a\n"one, or\ntwo",1\nthree,"say ""hi"""\n')
    (train,), (held_out,) = read(config(kind="csv", path=str(path), prompt="q", completion="a"))
    assert held_out.content == {"prompt": "one, or\ntwo", "completion": "1"}
    assert train.content == {"prompt": "three", "completion": 'say "hi"'}
    assert train.where == f"{path}:4"
    path = write("rows.tsv", "text\tlabel\nx\t0\ny\t1\n")
    assert texts(read(config(kind="csv", path=str(path), delimiter="\\t"))[0]) == ["y"]


def test_parquet_rows_and_chats(config, tmp_path):
    import pyarrow
    import pyarrow.parquet

    chats = [[{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": f"{i}!"}] for i in range(5)]
    pyarrow.parquet.write_table(pyarrow.table({"chat": chats, "id": range(5)}), tmp_path / "rows.parquet")
    train, held_out = read(config(kind="parquet", path=str(tmp_path), messages="chat"))
    assert held_out[0].content == {"messages": chats[0]} and train[0].content == {"messages": chats[1]}


def test_hub_reads_what_datasets_reads(write, config, tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    write("set/train.jsonl", [{"text": f"row {i}"} for i in range(20)])
    write("set/test.jsonl", [{"text": "held out"}])
    name = str(tmp_path / "set")
    train, held_out = read(config(kind="hub", name=name, eval_split="test"))
    assert texts(train) == [f"row {i}" for i in range(20)] and texts(held_out) == ["held out"]
    assert train[3].where == f"{name}[train]:4"
    wrong = refused(config(kind="hub", name=name, split="trian"))
    assert "data.split=trian" in wrong and "data.split=train" in wrong
    wrong = refused(config(kind="hub", name=name, text="txt"))
    assert "data.text=txt" in wrong and "try: data.text=text" in wrong
    wrong = refused(config(kind="hub", name=name, subset="nothing"))
    assert "data.subset=nothing" in wrong


def test_hub_names_the_classes_of_columns_of_classes(config, tmp_path, monkeypatch):
    """Also in lists; a hidden label (-1) is none."""
    import datasets
    from datasets import ClassLabel, Dataset, Features, List, Value

    from recipes.data.hub import HubSource

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    tag = ClassLabel(names=["O", "B-PER"])
    features = Features({"text": Value("string"), "label": ClassLabel(names=["neg", "pos"]), "tags": List(tag)})
    rows = {"text": ["a", "b"], "label": [1, -1], "tags": [[0, 1], [1]]}
    (tmp_path / "set").mkdir()
    Dataset.from_dict(rows, features).to_parquet(tmp_path / "set" / "train.parquet")
    fields = Fields({"label": "label", "tags": "tags"}, lambda content, where, columns: [], lambda content: False, None)
    source = HubSource(config(kind="hub", name=str(tmp_path / "set")), "data", 0.5, None, fields)
    found = [row.content for row in source.read(Problems(), Meter())]
    assert found == [{"label": "pos", "tags": ["O", "B-PER"]}, {"label": None, "tags": ["B-PER"]}]


def test_hub_names_that_are_scripts(config, tmp_path):
    """datasets runs no code of strangers: no traceback of that."""
    (tmp_path / "old").mkdir()
    (tmp_path / "old/old.py").write_text("")
    message = refused(config(kind="hub", name=str(tmp_path / "old")))
    assert f"data.name={tmp_path}/old" in message and "Parquet" in message


def test_hub_without_network_says_what_to_do(config, monkeypatch):
    import datasets

    def no_network(*args, **kwargs):
        raise ConnectionError("Couldn't reach 'owner/name' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", no_network)
    message = refused(config(kind="hub", name="owner/name"))
    assert "data.name=owner/name" in message and "HF_HOME" in message and "data=jsonl" in message


# The split


def test_split_is_a_pure_function_of_the_name():
    names = [f"pkg/module_{i}.py" for i in range(1000)]
    aside = held_out_files(names, 0.05)
    assert aside == held_out_files(names[::-1], 0.05)
    assert 25 <= len(aside) <= 80
    assert held_out_files(names[:2], 0.001) and len(held_out_files(names[:2], 0.999)) == 1
    assert held_out_row(0, 0.001) and not held_out_row(1, 0.999)
    assert sum(held_out_row(i, 0.1) for i in range(2, 5002)) == pytest.approx(500, abs=100)


# What is wrong


def checked(**keys) -> str:
    problems = check(DataConfig(**keys))
    return "\n".join(map(str, problems))


def test_check_imports_no_torch_and_is_quick(write):
    path = write("rows.jsonl", [{"text": "a"}])
    code = f"""if True:
        import sys
        from conf.schema import DataConfig
        import recipes.data.cache, recipes.data.encode, recipes.data.hub
        from recipes.data.sources import check
        assert not check(DataConfig(kind="jsonl", path={str(path)!r}))
        assert not check(DataConfig())
        loaded = {{"torch", "transformers", "datasets", "pyarrow"}} & set(sys.modules)
        assert not loaded, loaded"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).resolve().parents[3])
    start = time.perf_counter()
    assert not check(DataConfig(kind="jsonl", path=str(path)))
    assert time.perf_counter() - start < 0.3


def test_missing_path_names_the_nearest(write):
    path = write("shakespeare.txt", "a\nb\n")
    message = checked(kind="text", path=str(path.parent / "shakespear.txt"))
    assert "data.path=" in message and "no such file" in message and f"try: data.path={path}" in message
    assert "needs a path" in checked(kind="jsonl")
    assert "no file matches" in checked(kind="text", path=str(path.parent / "*.md"))
    assert "no file to read (.jsonl" in checked(kind="jsonl", path=str(path.parent))
    assert "data.eval_path" in checked(kind="text", path=str(path), eval_path="missing.txt")


def test_unknown_kind_and_half_a_pair(write):
    path = write("rows.jsonl", [{"q": "a"}])
    assert "try: data.kind=jsonl" in checked(kind="json", path=str(path))
    assert "data.completion=null" in checked(kind="jsonl", path=str(path), prompt="q")
    assert "data.name=null" in checked(kind="hub")
    assert "data.delimiter=;;" in checked(kind="csv", path=str(path), delimiter=";;")


def test_all_sources_of_a_mixture_are_checked(write):
    path = write("rows.jsonl", [{"text": "a"}])
    mixture = [SourceConfig("jsonl", "missing.jsonl"), SourceConfig("jsonl", str(path), text="txt")]
    message = checked(mixture=mixture)
    assert "data.mixture[0].path=missing.jsonl" in message and "data.mixture[1].text=txt" in message


@pytest.mark.parametrize("kind", ["text", "jsonl", "csv", "parquet"])
def test_empty_file(write, kind):
    path = write(f"empty.{kind}", b"")
    assert "no bytes" in checked(kind=kind, path=str(path))


def test_no_rows(write):
    assert "no rows" in checked(kind="jsonl", path=str(write("blank.jsonl", "\n\n")))
    assert "no rows" in checked(kind="csv", path=str(write("blank.csv.gz", "")))


@pytest.mark.parametrize(("name", "content"), [("r.jsonl", [{"text": "a", "id": 1}]), ("r.csv", "text,id\na,1\n")])
def test_no_such_column(write, name, content):
    message = checked(kind=name[2:], path=str(write(name, content)), text="txt")
    assert "data.text=txt" in message and "it has: text, id" in message and "try: data.text=text" in message


def test_no_such_column_in_parquet(tmp_path):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"]}), tmp_path / "r.parquet")
    assert "try: data.text=text" in checked(kind="parquet", path=str(tmp_path / "r.parquet"), text="txt")
    assert not checked(kind="parquet", path=str(tmp_path / "r.parquet"))


def test_broken_jsonl_lines_are_all_named(write, config):
    lines = ['{"text": "a"}', '{"text": "b"', "[1]", '{"txt": "c"}', '{"text": 7}', '{"text": null}', '{"text": ""}']
    path = write("rows.jsonl", "\n".join(lines))
    message = refused(config(kind="jsonl", path=str(path)))
    assert f"{path}:2: not valid JSON: Expecting ',' delimiter" in message
    assert f"{path}:3: a line must be a JSON object" in message
    assert f"{path}:4: no column 'text'; this row has: txt" in message
    assert f"{path}:5: column 'text' must be a string, it is a number" in message
    assert f"{path}:6: column 'text' must be a string, it is null" in message
    assert f"{path}:1:" not in message and f"{path}:7" not in message


def test_reading_stops_after_many_broken_lines(write, config):
    path = write("rows.jsonl", "nonsense\n" * 1000)
    message = refused(config(kind="jsonl", path=str(path)))
    assert message.count("not valid JSON") == MAX_PROBLEMS and "there may be more" in message


def test_invalid_utf8_names_the_line(write, config):
    path = write("rows.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n{"text": "b"}\n')
    assert f"{path}:2: not valid UTF-8: byte 0xff at byte 10 of the line" in refused(
        config(kind="jsonl", path=str(path))
    )
    path = write("text.txt", b"one\ntwo\nth\xe9ee\n")
    assert f"{path}:3: not valid UTF-8: byte 0xe9 at byte 10" in refused(config(kind="text", path=str(path)))
    path = write("rows.csv", b"text\na\n\xff\nb,c\n")
    message = refused(config(kind="csv", path=str(path)))
    assert f"{path}:3: not valid UTF-8" in message and f"{path}:4: 2 columns" in message


def test_csv_with_wrong_columns(write, config):
    path = write("rows.csv", 'text,id\na,1\nb\n"c\nd",2\ne,f,3\n"open')
    message = refused(config(kind="csv", path=str(path)))
    assert f"{path}:3: 1 columns, the header has 2 (text, id)" in message
    assert f"{path}:6: 3 columns" in message
    assert f"{path}:7: not valid CSV" in message


def test_damaged_files(write, config, tmp_path):
    import pyarrow
    import pyarrow.parquet

    path = write("rows.parquet", b"PAR1 not really")
    assert "not a readable parquet file" in checked(kind="parquet", path=str(path))
    whole = tmp_path / "whole.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": [f"text {i}" * 50 for i in range(4000)]}), whole)
    data = bytearray(whole.read_bytes())
    data[200:2000] = bytes(1800)
    path = write("damaged.parquet", bytes(data))
    assert "damaged" in refused(config(kind="parquet", path=str(path)))

    import random

    noise = random.Random(0).randbytes(20_000).hex()
    zipped = gzip.compress("".join(f'{{"text": "{noise[i : i + 40]}"}}\n' for i in range(0, 40_000, 40)).encode())
    path = write("rows.jsonl", zipped[: len(zipped) // 2])
    assert f"{path}: the gzip file is damaged" in refused(config(kind="jsonl", path=str(path)))
    path = write("text.txt", zipped[:-20])
    assert f"{path}: the gzip file is damaged" in refused(config(kind="text", path=str(path)))


def test_broken_chats(write, config):
    chats = [
        [{"role": "user", "content": "a"}],
        [{"role": "user"}],
        [{"rol": "user", "content": "a"}],
        [{"role": "user", "content": ["a"]}],
        ["hello"],
        "hello",
    ]
    path = write("rows.jsonl", [{"chat": chat} for chat in chats])
    message = refused(config(kind="jsonl", path=str(path), messages="chat"))
    assert f"{path}:2: message 1 has no 'content'" in message
    assert f"{path}:3: message 1 has no 'role'; it has: rol" in message
    assert f"{path}:4: 'content' of message 1 must be a string, it is a list" in message
    assert f"{path}:5: message 1 must have a role and a content" in message
    assert f"{path}:6: column 'chat' must be a list of messages, it is a string" in message


def test_a_single_line_cannot_be_split(write, config):
    assert "at least two lines" in refused(config(kind="text", path=str(write("one.txt", "one line"))))


def test_quotation_marks_between_tabs_are_text(tmp_path, config):
    path = tmp_path / "rows.tsv"

    def every(**keys):
        return sorted(text for split in read(config(kind="csv", path=str(path), **keys)) for text in texts(split))

    path.write_text('text\tlabel\n"great movie\t1\nfine one\t1\nawful"\t0\n"nice"\t1\n')
    assert every(delimiter="\t") == ['"great movie', '"nice"', 'awful"', "fine one"]
    assert every(delimiter="\t", quoting=True)[-1] == "nice"
    path.write_text('text\n"one, two"\n')
    assert every() == ["one, two"]


# Advice that works as it is typed, and lines before a header


@pytest.mark.parametrize(
    "value",
    ["class", " label", "a,b", "it's", 'say "x"', "$HOME", "back\\slash", "\\'", "end\\", "# made", "null", "0", "007",
     "é", "a=b", "[x]", "{x}", "a: b", "1e3", "`id`", "../x y/*", "", "True", "(x)", "@x", "~/x"],
)  # fmt: skip
def test_advice_is_read_as_it_is_meant(value):
    for key, wanted in (("data.label", value), ("data.labels", [value, "other"])):
        command = f"set -f; printf %s {assigned(key, wanted)}"
        found = read_overrides([subprocess.run(["bash", "-c", command], capture_output=True, text=True).stdout])
        assert not found.problems and found.given() == {key: wanted}


def test_columns_are_advised_as_they_are_written(write, config):
    fields = Fields({"text": "text", "label": "label"})
    for header, advised in (
        ("text, label", ["\"data.label=' label'\""]),
        ("Text,LABEL", ["data.text=Text", "data.label=LABEL"]),
        ("one,two", ["data.text=one", "data.label=one"]),
        ("id,txt,lable", ["data.text=txt", "data.label=lable"]),
    ):
        data = config(kind="csv", path=str(write("r.csv", f"{header}\n1,2,3\n")))
        problems = RecordSource(data, "data", 0.2, None, fields).check()
        assert [problem.nearest for problem in problems] == advised


@pytest.mark.parametrize(
    ("before", "delimiter"),
    [
        ("sep=;\n", ";"), ('"sep=,"\r\n', ","), ("\ufeffsep=,\n", ","),
        ("# made by x\n", ","), ("# made by x, y\n\n#z\n", ","),
    ],
)  # fmt: skip
def test_lines_before_the_header_are_passed_over_and_counted(write, config, before, delimiter):
    lines = [f"text{delimiter}label\n", *(f"t{n}{delimiter}a\n" for n in range(9))]
    path = write("r.csv", before + "".join(lines))
    data = config(kind="csv", path=str(path), delimiter=delimiter)
    fields = Fields({"text": "text", "label": "label"})
    source, problems, meter = RecordSource(data, "data", 0.2, None, fields), Problems(), Meter()
    assert source.check() == []
    found = list(source.read(problems, meter))
    assert len(found) == 9 and not problems.found
    assert meter.counts == {"lines before the header": before.count("\n")}
    assert found[0].where == f"{path}:{before.count(chr(10)) + 2}"
    data.delimiter = ";" if delimiter == "," else ","
    if ", y" not in before:
        assert f"data.delimiter='{delimiter}'" in str(RecordSource(data, "data", 0.2, None, fields).check()[0])


def test_a_header_may_begin_with_a_number_sign(write, config):
    data = config(kind="csv", path=str(write("r.csv", "#id,text\n#1,a\n2,b\n")))
    train, held_out = read(data)
    assert texts(held_out) + texts(train) == ["a", "b"]


@pytest.mark.parametrize(
    ("total", "done", "said"),
    [(68_629, 1, (1, 69, "reading r.csv (kB)")), (68_629, 68_629, (69, 69, "reading r.csv (kB)")),
     (25_000_001, 9_999_999, (10, 26, "reading r.csv (MB)")), (10, 12, (1, 1, "reading r.csv (kB)"))],
)  # fmt: skip
def test_progress_says_what_it_counts(config, total, done, said):
    source = RecordSource(config(kind="csv", path="r.csv"), "data", 0.2, None)
    assert source.read_so_far(Meter(total, done), "reading") == said
    assert LineSource(config(kind="line"), "data", 0.2, None).read_so_far(Meter(9, 3), "reading") == (
        3, 9, "reading line (rows)",
    )  # fmt: skip
