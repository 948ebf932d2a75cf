"""Small data sets of the kinds that well-known recipes read from the hub, made of the texts at hand.

    python benchmarks/standins.py DATA_FOLDER OUT_FOLDER

A stand-in has the columns, the splits and the files of its original, so that a recipe runs on it through the same code:
a local folder as `data.name=` where the original is on the hub. What a model reaches on one says that the recipe
learns, and nothing about the original. DATA_FOLDER as in benchmarks/tasks.py, with tinyshakespeare/input.txt.
"""

from __future__ import annotations

import csv
import gzip
import json
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.report import run
from conf.errors import Problem, RequestError

Rows = list[dict[str, Any]]
PER_CLASS = 1500
UNANSWERED = 3
"""One in so many questions of SQuAD 2.0 has no answer."""
PAIRS = 10_000


def _sentiments(data: Path, name: str) -> list[tuple[str, int]]:
    with (data / f"sst2/{name}.tsv").open(newline="", encoding="utf-8") as file:
        return [(text, int(label)) for text, label in csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)]


def _lines(path: Path) -> list[str]:
    return gzip.open(path, "rt", encoding="utf-8").read().splitlines()


def _articles(data: Path) -> list[Any]:
    return json.loads((data / "xquad/xquad.en.json").read_text(encoding="utf-8"))["data"]


def _split(rows: Rows, seed: int = 0) -> tuple[Rows, Rows]:
    """A tenth is held out."""
    rows = random.Random(seed).sample(rows, len(rows))
    return rows[len(rows) // 10 :], rows[: len(rows) // 10]


def ag_news(data: Path) -> tuple[Rows, Rows]:
    """Which of four bodies of text a passage is of: reviews, captions, Shakespeare, an encyclopaedia."""
    play = (data / "tinyshakespeare/input.txt").read_text(encoding="utf-8").split("\n\n")
    encyclopaedia = [
        sentence for article in _articles(data) for paragraph in article["paragraphs"]
        for sentence in paragraph["context"].split(". ")
    ]  # fmt: skip
    bodies = ([text for text, _ in _sentiments(data, "train")], _lines(data / "multi30k/train.en.gz"),
              [" ".join(speech.split()[:60]) for speech in play], encyclopaedia)  # fmt: skip
    rows = []
    for label, texts in enumerate(bodies):
        long_enough = [text for text in texts if len(text.split()) > 3]
        chosen = random.Random(label).sample(long_enough, min(PER_CLASS, len(long_enough)))
        rows += [{"text": text, "label": label} for text in chosen]
    return _split(rows)


def financial_phrases(data: Path) -> tuple[Rows, Rows]:
    """Sentiment with a neutral class: negative and positive reviews, and captions, which have none."""
    rows = [{"sentence": text, "label": 2 * label} for text, label in _sentiments(data, "train")[: 2 * PER_CLASS]]
    rows += [{"sentence": text, "label": 1} for text in _lines(data / "multi30k/train.en.gz")[:PER_CLASS]]
    return _split(rows)


def squad_v2(data: Path) -> tuple[Rows, Rows]:
    """XQuAD, where every third question is asked of another paragraph of its article, which does not answer it."""
    parts: tuple[Rows, Rows] = ([], [])
    articles = _articles(data)
    for number, article in enumerate(articles):
        contexts = [paragraph["context"] for paragraph in article["paragraphs"]]
        for place, paragraph in enumerate(article["paragraphs"]):
            for asked in paragraph["qas"]:
                answers = [answer["text"] for answer in asked["answers"]]
                row = {"id": asked["id"], "title": str(number), "question": asked["question"]}
                other = contexts[(place + 1) % len(contexts)]
                part = parts[number >= 0.9 * len(articles)]
                if len(part) % UNANSWERED == 2 and not any(answer in other for answer in answers):
                    row |= {"context": other, "answers": {"text": [], "answer_start": []}}
                else:
                    starts = [answer["answer_start"] for answer in asked["answers"]]
                    row |= {"context": contexts[place], "answers": {"text": answers, "answer_start": starts}}
                part.append(row)
    return parts


def wmt14(data: Path) -> tuple[Rows, Rows]:
    """Multi30k, French to English."""

    def pairs(name: str) -> Iterator[dict[str, Any]]:
        sides = (_lines(data / f"multi30k/{name}.{language}.gz") for language in ("fr", "en"))
        for french, english in zip(*sides, strict=True):
            yield {"translation": {"fr": french, "en": english}}

    return list(pairs("train"))[:PAIRS], list(pairs("val"))


FOLDERS: dict[str, tuple[Callable[[Path], tuple[Rows, Rows]], str]] = {
    "ag_news": (ag_news, "test"), "financial_phrases": (financial_phrases, "validation"),
    "squad_v2": (squad_v2, "validation"), "wmt14": (wmt14, "validation"),
}  # fmt: skip
"""Recipe → (the rows for training and those held out, the name of the latter split)."""


def conll2003(data: Path, out: Path) -> None:
    """WNUT-17 in the four columns of CoNLL-2003: its parts of speech and chunks are unknown."""
    out.mkdir(parents=True, exist_ok=True)
    for name, file in (("train", "eng.train"), ("dev", "eng.testa")):
        lines = (data / f"wnut17/{name}.conll").read_text(encoding="utf-8").splitlines()
        columns = (line.split("\t") for line in lines)
        text = "".join(f"{word[0]} NN O {word[-1]}\n" if word[0].strip() else "\n" for word in columns)
        (out / file).write_text(f"-DOCSTART- -X- -X- O\n\n{text}", encoding="utf-8")


def make(data: Path, out: Path, wanted: str) -> Path:
    """The folder of the stand-in for `wanted`, in `out`; made anew each time."""
    folder = out / wanted
    if wanted == "conll2003":
        conll2003(data, folder)
        return folder
    from datasets import Dataset

    rows, split = FOLDERS[wanted]
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in zip(("train", split), rows(data), strict=True):
        Dataset.from_list(part).to_parquet(folder / f"{name}-00000-of-00001.parquet")
    return folder


def main(argv: list[str]) -> int:
    if len(argv) != 2 or not Path(argv[0]).is_dir():
        rule = "the folder of the data sets, and one for what is made of them"
        nearest = "python benchmarks/standins.py DATA_FOLDER OUT_FOLDER"
        raise RequestError(Problem("DATA_FOLDER OUT_FOLDER", " ".join(argv), rule, nearest))
    for name in (*FOLDERS, "conll2003"):
        print(make(Path(argv[0]), Path(argv[1]), name))
    return 0


if __name__ == "__main__":
    run(main)
