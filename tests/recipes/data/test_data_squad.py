"""SQuAD files: the real one, the split by article, and each way in which one can be wrong."""

from __future__ import annotations

import copy
import gzip
import json

import pytest

from conf.errors import RequestError
from recipes.data.rows import MAX_PROBLEMS, Meter, Problems
from recipes.data.squad import SquadSource


def read(data, meter=None):
    """(training rows, held-out rows)."""
    problems = Problems()
    found = list(SquadSource(data, "data", data.held_out, None).read(problems, meter or Meter()))
    problems.raise_any()
    return [row for row in found if not row.held_out], [row for row in found if row.held_out]


def refused(data) -> str:
    with pytest.raises(RequestError) as caught:
        read(data)
    return caught.value.render()


def article(number: int, questions: int = 2) -> dict:
    context = f"Title {number} was built in 18{number:02} by Ada."
    asked = [
        {"id": f"q{number}-{i}", "question": f"Who built {number}?", "answers": [{"text": "Ada", "answer_start": -1}]}
        for i in range(questions)
    ]
    for record in asked:
        record["answers"][0]["answer_start"] = context.index("Ada")
    return {"title": f"Title_{number}", "paragraphs": [{"context": context, "qas": asked}]}


@pytest.fixture
def squad(write, config):
    """squad(articles or document or bytes, **keys) → configuration of a file with it."""

    def squad(content, name: str = "squad.json", **keys):
        document = {"version": "1.1", "data": content} if isinstance(content, list) else content
        data = document if isinstance(document, bytes) else json.dumps(document, indent=1).encode()
        return config(kind="squad", path=str(write(name, data)), **keys)

    return squad


@pytest.fixture
def broken(squad):
    """broken(change) → the message about ten articles after `change(data)`."""

    def broken(change) -> str:
        data = copy.deepcopy([article(i) for i in range(10)])
        change(data)
        return refused(squad(data))

    return broken


def first(data) -> dict:
    """The first question."""
    return data[0]["paragraphs"][0]["qas"][0]


# The real file


def test_xquad(shared, config):
    path = shared("xquad/xquad.en.json")
    data = config(kind="squad", path=str(path), held_out=0.2)
    assert SquadSource(data, "data", 0.2, None).check() == []
    meter = Meter()
    train, held_out = read(data, meter)
    assert len(train) + len(held_out) == 1190 and meter.done == path.stat().st_size
    for row in train + held_out:
        assert set(row.content) == {"id", "question", "context", "answers"}
        (answer,) = row.content["answers"]
        assert row.content["context"][answer["start"] :].startswith(answer["text"])
        assert row.where == f"{path}: question {row.content['id']}" or row.where.endswith(")")
    document = json.loads(path.read_text("utf-8"))["data"]
    assert len(document) == 48
    asked = [[qa["id"] for paragraph in one["paragraphs"] for qa in paragraph["qas"]] for one in document]
    assert [row.content["id"] for row in train] == [name for one in asked[:38] for name in one]  # 0.8 × 48 = 38.4
    assert [row.content["id"] for row in held_out] == [name for one in asked[38:] for name in one]
    assert not {row.content["context"] for row in train} & {row.content["context"] for row in held_out}


def test_gzip_gives_the_same_rows(shared, config, write):
    path = shared("xquad/xquad.en.json")
    zipped = write("copy.json.gz", path.read_bytes())
    plain, copied = (read(config(kind="squad", path=str(file), held_out=0.2)) for file in (path, zipped))
    assert [[row.content for row in split] for split in plain] == [[row.content for row in split] for split in copied]


# The split


@pytest.mark.parametrize(("share", "trained"), [(0.2, 8), (0.001, 9), (0.999, 1)])
def test_the_last_articles_are_held_out(squad, share, trained):
    train, held_out = read(squad([article(i) for i in range(10)], held_out=share))
    assert [row.content["id"] for row in train] == [f"q{i}-{j}" for i in range(trained) for j in range(2)]
    assert len(held_out) == 20 - len(train)
    assert train[0].where.endswith("squad.json: question q0-0 (Title_0)")


def test_articles_of_several_files_are_counted_together(squad, config, tmp_path):
    squad([article(i) for i in range(3)], "many/a.json")
    squad([article(3)], "many/b.json.gz")
    train, held_out = read(config(kind="squad", path=str(tmp_path / "many"), held_out=0.25))
    assert [row.content["id"][:2] for row in train] == ["q0", "q0", "q1", "q1", "q2", "q2"]
    assert [row.content["id"][:2] for row in held_out] == ["q3", "q3"]


def test_a_single_article_is_split_by_question(squad):
    train, held_out = read(squad([article(0, questions=10)], held_out=0.3))
    assert [row.content["id"] for row in held_out] == ["q0-7", "q0-8", "q0-9"] and len(train) == 7
    assert "a single question cannot be split" in refused(squad([article(0, questions=1)]))


def test_eval_path_is_the_held_out_split(squad, write):
    path = write("eval.json", json.dumps({"data": [article(0)]}))
    train, held_out = read(squad([article(0), article(1)], eval_path=str(path)))
    assert [row.content["id"] for row in train] == ["q0-0", "q0-1", "q1-0", "q1-1"]
    assert [row.content["id"] for row in held_out] == ["q0-0", "q0-1"]


def test_the_fingerprint_follows_the_content(squad):
    def fingerprint(count):
        return SquadSource(squad([article(i) for i in range(count)]), "data", 0.2, None).fingerprint()

    assert fingerprint(3) == fingerprint(3) != fingerprint(4)


# SQuAD 2.0


def test_unanswerable_questions_have_no_answers(squad):
    data = [article(0), article(1)]
    first(data).update(is_impossible=True, answers=[], plausible_answers=[{"text": "Ada", "answer_start": 0}])
    data[0]["paragraphs"][0]["qas"][1]["is_impossible"] = False
    train, _ = read(squad(data))
    assert [len(row.content["answers"]) for row in train] == [0, 1]


def test_contradictory_marks(broken):
    assert "'is_impossible' is true, but there is an answer" in broken(lambda d: first(d).update(is_impossible=True))
    assert "'is_impossible' must be true or false" in broken(lambda d: first(d).update(is_impossible="no"))


def test_answers_are_missing(squad, write, broken):
    message = broken(lambda d: first(d).update(answers=[]))
    assert "question q0-0 (Title_0): 'answers' is empty" in message and 'try: "is_impossible": true' in message
    assert "squad.json: data[0].paragraphs[0].qas[0]: no 'answers'; it has: id, question" in broken(
        lambda d: first(d).pop("answers")
    )
    data = [article(0)]
    del first(data)["answers"]
    meter = Meter()
    path = write("eval.json", json.dumps({"data": data}))
    _, held_out = read(squad([article(1)], eval_path=str(path)), meter)
    assert len(held_out) == 1 and meter.counts == {"held-out questions without an answer": 1}


# Offsets


def test_an_answer_is_not_at_its_offset(broken):
    def move(start, text="Ada"):
        return lambda d: first(d).update(answers=[{"text": text, "answer_start": start}])

    message = broken(move(0))
    assert (
        "question q0-0 (Title_0): the answer 'Ada' is not at character 0 of the context: there stands 'Tit'" in message
    )
    assert 'try: "answer_start": 29' in message
    message = broken(move(900))
    assert "not at character 900 of the context: the context has 33 characters" in message and "29" in message
    assert '"answer_start": 29' in broken(move(-4))  # where a slice from the end would find it
    message = broken(move(29, "Bob"))
    assert "the context does not have it anywhere" in message and "try:" not in message
    assert '"answer_start": 14' in broken(move(11, "i"))  # the nearest of several


def test_offsets_count_characters_not_bytes(squad):
    data = [article(0), article(1)]
    data[0]["paragraphs"][0]["context"] = "ÄÖ𝔘 Ada"
    for record in data[0]["paragraphs"][0]["qas"]:
        record["answers"][0]["answer_start"] = 4
    train, _ = read(squad(data))
    assert train[0].content["answers"] == [{"text": "Ada", "start": 4}]


# What is no SQuAD file


def test_not_json(squad, write, config):
    path = write("rows.json", '{"data": [\n{"title": "a",}\n]}')
    assert f"{path}:2: not valid JSON" in refused(config(kind="squad", path=str(path)))
    path = write("rows.jsonl", [{"question": "a"}, {"question": "b"}])
    message = refused(config(kind="squad", path=str(path)))
    assert f"{path}:2: not valid JSON: Extra data at column 1" in message and "data.kind=jsonl" in message
    for content, rule in (
        (b'{"data": [], "data": []}', "the key 'data' stands twice"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"data": ' + b"1" * 5000 + b"}", "not valid JSON"),
        (b'{"data": "\xff"}', "squad.json:1: not valid UTF-8"),
        (b'{"data": []}', "no articles"),
        (b'{"dat": []}', "no 'data'; it has: dat"),
        (b'{"data": {}}', "'data' must be a list, it is an object"),
        (b"[1]", "must be an object with 'data', it is a list"),
    ):
        assert rule in refused(squad(content))


def test_damaged_gzip(write, config):
    zipped = gzip.compress(json.dumps({"data": [article(i) for i in range(99)]}).encode())
    data = config(kind="squad", path=str(write("cut.json", zipped[: len(zipped) // 2])))
    assert "the gzip file is damaged" in refused(data)


def test_check_sees_what_is_no_object(squad, config):
    def checked(data):
        return "\n".join(map(str, SquadSource(data, "data", 0.2, None).check()))

    assert "data.path=null: squad data needs a path" in checked(config(kind="squad"))
    assert "there is no such file" in checked(config(kind="squad", path="missing.json"))
    assert "no bytes" in checked(squad(b""))
    assert "does not begin with {" in checked(squad(b"question,answer\n"))
    assert "gzip" in checked(squad(gzip.compress(b"x" * 10_000)[:12]))
    assert checked(squad([article(0)])) == ""
    assert checked(squad(b"\xef\xbb\xbf\n {}", "mark.json.gz")) == ""


def test_every_place_in_the_document_is_named(broken):
    paragraph = "squad.json: data[3].paragraphs[0]"

    def change(data):
        data[0] = 7
        del data[1]["paragraphs"]
        data[2]["paragraphs"] = [None]
        data[3]["paragraphs"][0]["contxt"] = data[3]["paragraphs"][0].pop("context")
        data[3]["paragraphs"][0]["qas"][1]["id"] = 7
        del data[4]["paragraphs"][0]["qas"]
        data[5]["paragraphs"][0]["context"] = " "
        data[6]["paragraphs"][0]["qas"][0]["question"] = ""
        data[6]["paragraphs"][0]["qas"][1] = []
        data[7]["paragraphs"][0]["qas"][0]["answers"] = ["Ada"]
        data[7]["paragraphs"][0]["qas"][1]["answers"] = [{"text": "", "answer_start": "29"}]
        data[8]["paragraphs"][0]["qas"][0]["answers"] = [{"text": "Ada", "answer_start": True}]
        data[8]["paragraphs"][0]["qas"][1]["question"] = "\ud800"

    message = broken(change)
    for rule in (
        "squad.json: data[0]: must be an object with 'paragraphs', it is a number",
        "squad.json: data[1]: no 'paragraphs'; it has: title",
        "squad.json: data[2].paragraphs[0]: must be an object with 'context', it is null",
        f"{paragraph}: no 'context'; it has: qas, contxt\n      try: did you mean 'contxt'?",
        f"{paragraph}.qas[1]: 'id' must be a string, it is a number",
        "data[4].paragraphs[0]: no 'qas'; it has: context",
        "data[5].paragraphs[0]: 'context' is empty",
        "data[6].paragraphs[0].qas[0]: 'question' is empty",
        "data[6].paragraphs[0].qas[1]: must be an object with 'id', it is a list",
        "data[7].paragraphs[0].qas[0].answers[0]: must be an object with 'text', it is a string",
        "data[7].paragraphs[0].qas[1].answers[0]: 'text' is empty",
        "data[7].paragraphs[0].qas[1].answers[0]: 'answer_start' must be a whole number, it is a string",
        "data[8].paragraphs[0].qas[0].answers[0]: 'answer_start' must be a whole number, it is a boolean",
        "data[8].paragraphs[0].qas[1]: 'question' has half a surrogate pair",
    ):
        assert rule in message
    assert message.startswith("error: 14 problems")


def test_an_id_twice(broken):
    message = broken(lambda d: first(d).update(id="q1-0"))
    assert "squad.json: question q1-0 (Title_1): the id of data[1].paragraphs[0].qas[0] is already that of" in message
    assert "squad.json: data[0].paragraphs[0].qas[0]" in message


def test_reading_stops_after_many_problems(squad):
    data = [article(i) for i in range(99)]
    for one in data:
        one["paragraphs"][0]["context"] = "nothing"
    message = refused(squad(data))
    assert message.count("is not at character") == MAX_PROBLEMS and "there may be more" in message
