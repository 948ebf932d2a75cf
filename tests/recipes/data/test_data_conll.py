"""CoNLL files: columns, comments, tags of either kind, the split, and each way in which a line can be wrong."""

from __future__ import annotations

import gzip
import random
from collections import Counter

import pytest

from conf.errors import RequestError
from recipes.data.conll import FIRST_TAGS, Columns, ConllSource, is_entity_tag
from recipes.data.rows import MAX_PROBLEMS, Meter, Problems


def source(data) -> ConllSource:
    return ConllSource(data, "data", data.held_out, None)


def read(data):
    """(rows of both splits in their order, what was skipped)."""
    problems, meter = Problems(), Meter()
    rows = list(source(data).read(problems, meter))
    problems.raise_any()
    assert meter.done == source(data).size()
    return rows, meter.counts


def refused(data) -> str:
    with pytest.raises(RequestError) as caught:
        read(data)
    return caught.value.render()


def checked(data) -> str:
    return "\n".join(map(str, source(data).check()))


@pytest.fixture
def conll(config):
    """A configuration of this kind of data."""

    def conll(path, **keys):
        return config(kind="conll", path=str(path), **keys)

    return conll


# What is read


def test_tabs_or_spaces_and_sentence_ends(write, conll):
    path = write("rows.conll", "\n\nEU\tB-ORG\r\nsays\tO\n\t\nno\tO\n  \n\nlast\tI-ORG")
    rows, skipped = read(conll(path))
    assert [row.content for row in rows] == [
        {"tokens": ["EU", "says"], "tags": ["B-ORG", "O"]},
        {"tokens": ["no"], "tags": ["O"]},
        {"tokens": ["last"], "tags": ["I-ORG"]},
    ]
    assert [row.where for row in rows] == [f"{path}:3", f"{path}:6", f"{path}:9"] and not skipped
    spaced = write(
        "rows.txt", "-DOCSTART- -X- -X- O\n\nEU  NNP B-NP B-ORG \nsays VBZ B-VP O\n-DOCSTART- O\nno DT B-NP O\n"
    )
    assert [row.content for row in read(conll(spaced))[0]] == [
        {"tokens": ["EU", "says"], "tags": ["B-ORG", "O"]},
        {"tokens": ["no"], "tags": ["O"]},
    ]
    assert read(conll(spaced, label="1"))[0][0].content["tags"] == ["NNP", "VBZ"]
    assert read(conll(spaced, tokens="-1", label="-2"))[0][0].content == {
        "tokens": ["B-ORG", "O"],
        "tags": ["B-NP", "B-VP"],
    }


def test_a_tab_separates_tokens_with_spaces_of_any_kind(write, conll):
    path = write("rows.tsv", "New York\tB-LOC\na\u00a0b\tO\n\u3000\tO\n")
    assert read(conll(path))[0][0].content["tokens"] == ["New York", "a\u00a0b", "\u3000"]
    path = write("rows.txt", "a\u00a0b O\n")
    assert read(conll(path))[0][0].content["tokens"] == ["a\u00a0b"]


def test_comments_are_told_from_the_token_of_the_same_look(write, conll):
    path = write("tabs.conll", "# id = 1\n# text = a b\na\tO\n#\tO\n# b\n\n# text = c d e f\nc\tO\n")
    rows, skipped = read(conll(path))
    assert [row.content["tokens"] for row in rows] == [["a", "#"], ["c"]] and skipped == {"comment lines": 4}
    assert [row.where for row in rows] == [f"{path}:3", f"{path}:8"]
    path = write("spaces.conll", "# id 4f domain=en train\na _ _ O\n# _ _ O\n")
    rows, skipped = read(conll(path))
    assert [row.content["tokens"] for row in rows] == [["a", "#"]] and skipped == {"comment lines": 1}


def test_the_first_tags_decide_what_kind_they_are(write, conll):
    path = write("pos.conll", "the DT\n-LRB- -LRB-\nx PREP-2\ny b-x\n")
    assert read(conll(path))[0][0].content["tags"] == ["DT", "-LRB-", "PREP-2", "b-x"]
    path = write("late.conll", "a O\n\n" * 300 + "b X\n" * (FIRST_TAGS - 1) + "c I-PER\n")
    assert refused(conll(path)).count("'X' is neither O nor PREFIX-TYPE") == MAX_PROBLEMS
    path = write("too_late.conll", "b X\n" * FIRST_TAGS + "c I-PER\n")
    assert len(read(conll(path))[0][0].content["tags"]) == FIRST_TAGS + 1
    path = write("bilou.conll", "a B-x-y\nb I-x-y\nc L-x-y\nd U-z\ne S-z\nf E-z\ng I-z\nh O\n")
    assert len(read(conll(path))[0][0].content["tags"]) == 8


def test_entity_tags():
    assert all(map(is_entity_tag, ("O", "B-a", "I-a", "E-a", "S-a", "L-a", "U-a", "B-creative-work", "I--")))
    assert not any(map(is_entity_tag, ("", "o", "B", "B-", "O-a", "b-a", "X-a", "NN", "-LRB-", "B_a")))


@pytest.mark.parametrize(
    ("columns", "needed"),
    [((0, -1), 2), ((0, 3), 4), ((3, 1), 4), ((-1, -2), 2), ((1, -1), 3), ((1, -2), 4), ((-1, 0), 2)],
)
def test_columns_needed(columns, needed):
    assert Columns(*columns).needed == needed
    assert len({range(needed)[column] for column in columns}) == 2


def test_split_by_sentence_or_by_file(write, conll):
    path = write("rows.conll.gz", "".join(f"w{i} O\n\n" for i in range(200)))
    rows, _ = read(conll(path, held_out=0.1))
    aside = [row.held_out for row in rows]
    assert aside[:2] == [True, False] and 8 <= sum(aside) <= 35
    assert aside == [row.held_out for row in read(conll(path, held_out=0.1))[0]]
    other = write("eval.conll", "x O\n")
    rows, _ = read(conll(path, eval_path=str(other)))
    assert [row.where for row in rows if row.held_out] == [f"{other}:1"] and len(rows) == 201


def test_real_tweets(shared, conll):
    rows, skipped = read(conll(shared("wnut17/dev.conll"), eval_path=str(shared("wnut17/test.conll"))))
    assert [sum(row.held_out == split for row in rows) for split in (False, True)] == [1009, 1287]
    assert not skipped
    counts = Counter(tag for row in rows for tag in row.content["tags"])
    assert counts["O"] == 14483 + 21654 and counts["B-creative-work"] == 105 + 142 and len(counts) == 13
    assert all(len(row.content["tokens"]) == len(row.content["tags"]) for row in rows)
    assert rows[0].content["tokens"][:3] == ["Stabilized", "approach", "or"]
    assert sum(row.content["tokens"].count("#") for row in rows) > 10


# What is wrong


def test_too_few_columns(write, conll):
    path = write("rows.conll", "a\tO\nb\n\nc O\nd\tO\n\n\tO\ne\t\nf\t \tO\n")
    message = refused(conll(path))
    assert f"{path}:2: 1 tab-separated column, tokens=0 and label=-1 need 2" in message
    assert f"{path}:4: 1 tab-separated column" in message and f"{path}:8: 1 tab-separated column" in message
    assert f"{path}:7: column 0 (tokens) is empty" in message
    assert f"{path}:9: 3 columns, the first line with a token has 2" in message
    assert message.startswith("error: 5 problems")
    assert f"{path}:2: 1 tab-separated column" in checked(conll(write("rows.conll", "a\tO\nb\n")))
    assert f"{path}:1: 2 tab-separated columns, tokens=0 and label=3 need 4" in checked(conll(path, label="3"))
    path = write("spaces.conll", "a O\nb\n")
    assert f"{path}:2: 1 space-separated column," in refused(conll(path))


def test_another_number_of_columns_than_the_first_line(write, conll):
    """A missing last column would make another one the tag, a token with a space in it two tokens."""
    path = write("rows.conll", "EU NNP B-NP B-ORG\nGerman JJ B-NP\nNew York NNP B-NP B-LOC\n")
    message = refused(conll(path))
    assert f"{path}:2: 3 columns, the first line with a token has 4" in message and f"{path}:3: 5 columns" in message


def test_empty_tag(write, conll):
    path = write("rows.conll", "a\t \tO\nb\tx\tO\n")
    assert f"{path}:1: column 1 (label) is empty" in refused(conll(path, label="1"))


def test_wrong_tags_name_the_nearest(write, conll):
    path = write("rows.conll", "a B-PER\nb b-PER\n\nc PER\nd 0\ne B-\n")
    message = refused(conll(path))
    assert f"{path}:2: the tag 'b-PER' is neither O nor PREFIX-TYPE (B, I, E, S, L, U)\n      try: B-PER" in message
    assert "'PER' is neither" in message and "try: B-PER" in message
    assert f"{path}:5: the tag '0'" in message and "try: O" in message
    assert f"{path}:6: the tag 'B-'" in message and message.startswith("error: 4 problems")


def test_wrong_column_numbers(write, conll):
    path = write("rows.conll", "a O\nb O\n")
    message = checked(conll(path, tokens="word", label="1.0"))
    assert "data.tokens=word" in message and "data.label=1.0" in message and "try: data.label=-1" in message
    assert "data.label=0: tags are in another column than tokens" in checked(conll(path, label="0"))
    assert "data.tokens=word" in refused(conll(path, tokens="word"))
    message = checked(conll("missing.conll", tokens="word"))
    assert "data.tokens=word" in message and "data.path=missing.conll" in message
    assert not checked(conll(path))


def test_files_without_a_sentence(write, conll):
    assert "no bytes" in checked(conll(write("empty.conll", b"")))
    assert "no sentences" in checked(conll(write("blank.conll", "\n \t\n-DOCSTART- O\n\n")))
    assert "no sentences" in checked(conll(write("empty.conll.gz", "")))


def test_damaged_gzip_and_broken_utf8(write, conll):
    noise = random.Random(0).randbytes(20_000).hex()
    zipped = gzip.compress("".join(f"{noise[i : i + 40]} O\n" for i in range(0, 40_000, 40)).encode())
    path = write("cut.conll", zipped[: len(zipped) // 2])
    assert f"{path}: the gzip file is damaged" in refused(conll(path))
    path = write("latin.conll", b"a\tO\ncaf\xe9\tO\n\nb\tO\n")
    assert f"{path}:2: not valid UTF-8: byte 0xe9 at byte 3 of the line" in refused(conll(path))


def test_a_file_of_another_kind_stops_early(write, conll):
    path = write("prose.txt", "nonsense\n" * 1000)
    message = refused(conll(path))
    assert message.count("1 space-separated column") == MAX_PROBLEMS and "there may be more" in message
    assert "there may be more" in checked(conll(path))
