"""A task as a plain script of transformers does it: Trainer, a collator, a few lines around it, one process.

    python benchmarks/plain_trainer.py RECIPE key=value …

Model, data, epochs, batch, optimizer and schedule are those of the recipe; everything else is Trainer's own, and the
data are read and the predictions judged without ours (but for the metrics' libraries). Prints a JSON object: metric,
seconds in Trainer.
"""

from __future__ import annotations

import collections
import csv
import itertools
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

import numpy as np
import transformers
from datasets import Dataset

from benchmarks.report import run
from conf.compose import compose
from conf.schema import Config
from recipes.models.build import package_folder, set_dropout

Task = tuple[Any, Dataset, Dataset, Any, Any]
"""Auto class with its options, training rows, held-out rows, collator, metrics of Trainer's predictions."""


def sequence_classification(cfg: Config, tokenizer: Any) -> Task:
    """As transformers' run_classification.py: a tab-separated file, accuracy."""

    def rows(path: str) -> Dataset:
        with open(path, newline="") as file:
            pairs = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
        ids = tokenizer([text for text, _ in pairs], truncation=True, max_length=cfg.data.seq_length)
        return Dataset.from_dict({**ids, "labels": [int(label) for _, label in pairs]})

    def metrics(found: Any) -> dict[str, float]:
        return {"accuracy": float((found.predictions.argmax(-1) == found.label_ids).mean())}

    model = (transformers.AutoModelForSequenceClassification, {"num_labels": 2})
    collator = transformers.DataCollatorWithPadding(tokenizer)
    return model, rows(str(cfg.data.path)), rows(str(cfg.data.eval_path)), collator, metrics


def token_classification(cfg: Config, tokenizer: Any) -> Task:
    """As transformers' run_ner.py: words and tags, the first piece of a word is labelled, seqeval's F1."""
    from seqeval.metrics import f1_score

    def read(path: str) -> list[tuple[list[str], list[str]]]:
        lines = (line.split("\t") for line in Path(path).read_text().split("\n"))
        sentences = (list(part) for full, part in itertools.groupby(lines, lambda line: bool(line[0].strip())) if full)
        return [([word for word, *_ in lines], [line[-1] for line in lines]) for lines in sentences]

    train, held_out = read(str(cfg.data.path)), read(str(cfg.data.eval_path))
    names = sorted({tag for _, tags in train for tag in tags})

    def rows(sentences: list[tuple[list[str], list[str]]]) -> Dataset:
        words = [words for words, _ in sentences]
        ids = tokenizer(words, is_split_into_words=True, truncation=True, max_length=cfg.data.seq_length)
        labels = []
        for number, (_, tags) in enumerate(sentences):
            places = ids.word_ids(number)
            firsts = [
                word is not None and word != before for before, word in zip([None, *places], places, strict=False)
            ]
            labels.append(
                [names.index(tags[word]) if first else -100 for word, first in zip(places, firsts, strict=True)]
            )
        return Dataset.from_dict({**ids, "labels": labels})

    def metrics(found: Any) -> dict[str, float]:
        judged = found.label_ids != -100
        told, right = (
            [[names[tag] for tag in row[mask]] for row, mask in zip(tags, judged, strict=True)]
            for tags in (found.predictions.argmax(-1), found.label_ids)
        )
        return {"f1": float(f1_score(right, told))}

    model = (transformers.AutoModelForTokenClassification, {"num_labels": len(names)})
    return model, rows(train), rows(held_out), transformers.DataCollatorForTokenClassification(tokenizer), metrics


def question_answering(cfg: Config, tokenizer: Any) -> Task:
    """As transformers' run_qa.py: overlapping windows, the best of 20 × 20 starts and ends, SQuAD's F1."""
    articles = json.loads(Path(str(cfg.data.path)).read_text())["data"]
    cut = len(articles) - round(cfg.data.held_out * len(articles))

    def examples(part: list[Any]) -> list[Any]:
        return [
            (asked["id"], asked["question"].strip(), paragraph["context"], asked["answers"])
            for article in part for paragraph in article["paragraphs"] for asked in paragraph["qas"]
        ]  # fmt: skip

    held_out = examples(articles[cut:])

    def windows(rows: list[Any]) -> tuple[Dataset, list[tuple[int, list[Any]]]]:
        ids = tokenizer(
            [row[1] for row in rows], [row[2] for row in rows], truncation="only_second", stride=cfg.data.stride,
            max_length=cfg.data.seq_length, return_overflowing_tokens=True, return_offsets_mapping=True,
        )  # fmt: skip
        starts, ends, places = [], [], []
        for number, (row, offsets) in enumerate(
            zip(ids.pop("overflow_to_sample_mapping"), ids.pop("offset_mapping"), strict=True)
        ):
            inside = [pair if part == 1 else None for pair, part in zip(offsets, ids.sequence_ids(number), strict=True)]
            answer = rows[row][3][0]
            first, last = answer["answer_start"], answer["answer_start"] + len(answer["text"])
            touched = [n for n, pair in enumerate(inside) if pair and pair[0] < last and pair[1] > first]
            whole = bool(touched) and inside[touched[0]][0] <= first and inside[touched[-1]][1] >= last
            starts.append(touched[0] if whole else 0)
            ends.append(touched[-1] if whole else 0)
            places.append((row, inside))
        return Dataset.from_dict({**ids, "start_positions": starts, "end_positions": ends}), places

    held_out_windows, places = windows(held_out)

    def metrics(found: Any) -> dict[str, float]:
        from torchmetrics.functional.text import squad

        best: dict[int, tuple[float, str]] = collections.defaultdict(lambda: (-np.inf, ""))
        for start, end, (row, inside) in zip(*found.predictions, places, strict=True):
            for first in np.argsort(start)[-20:]:
                for last in np.argsort(end)[-20:]:
                    if first <= last < first + 30 and inside[first] and inside[last]:
                        text = held_out[row][2][inside[first][0] : inside[last][1]]
                        best[row] = max(best[row], (float(start[first] + end[last]), text))
        told = [{"id": row[0], "prediction_text": best[number][1]} for number, row in enumerate(held_out)]
        right = [
            {
                "id": row[0],
                "answers": {
                    "text": [answer["text"] for answer in row[3]],
                    "answer_start": [answer["answer_start"] for answer in row[3]],
                },
            }
            for row in held_out
        ]
        return {"f1": float(squad(told, right)["f1"]) / 100}

    model = (transformers.AutoModelForQuestionAnswering, {})
    rows, _ = windows(examples(articles[:cut]))
    return model, rows, held_out_windows, transformers.DataCollatorWithPadding(tokenizer), metrics


TASKS = {
    "sequence_classification": sequence_classification, "token_classification": token_classification,
    "question_answering": question_answering,
}  # fmt: skip


def main(argv: list[str]) -> int:
    recipe, *overrides = argv
    cfg = compose([f"+recipe={recipe}", *overrides], 1)
    folder = package_folder(str(cfg.model.path)) or str(cfg.model.path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    (auto, options), train, held_out, collator, metrics = TASKS[cfg.task](cfg, tokenizer)
    transformers.set_seed(cfg.seed)
    optimizer = cfg.optimizer
    arguments = transformers.TrainingArguments(
        output_dir=tempfile.mkdtemp(), seed=cfg.seed, num_train_epochs=float(cfg.train.epochs or 0),
        per_device_train_batch_size=cfg.batch.global_size, per_device_eval_batch_size=cfg.eval.micro_size or 8,
        learning_rate=optimizer.lr, weight_decay=optimizer.weight_decay, adam_beta1=optimizer.betas[0],
        adam_beta2=optimizer.betas[1], adam_epsilon=optimizer.eps, max_grad_norm=optimizer.gradient_clipping,
        lr_scheduler_type="linear", warmup_steps=cfg.scheduler.warmup_steps, use_cpu=True, report_to="none",
        logging_strategy="no", save_strategy="no", disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    config = set_dropout(transformers.AutoConfig.from_pretrained(folder, **options), cfg.model.dropout)
    model = auto.from_pretrained(folder, config=config)
    loop = transformers.Trainer(model, arguments, collator, train, held_out, compute_metrics=metrics)
    started = time.perf_counter()
    loop.train()
    found = {key.removeprefix("eval_"): value for key, value in loop.evaluate().items()}
    print(json.dumps({**found, "trainer_s": time.perf_counter() - started}))
    return 0


if __name__ == "__main__":
    run(main)
