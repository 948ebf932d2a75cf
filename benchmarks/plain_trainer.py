"""A task as a plain script of transformers does it: Trainer, a collator, a few lines around it, one process.

    python benchmarks/plain_trainer.py RECIPE key=value …

Model, data, epochs, batch, optimizer and schedule are those of the recipe; everything else is Trainer's own, and the
data are read and the predictions judged without ours (but for the metrics' libraries). Prints a JSON object: metric,
seconds in Trainer.
"""

from __future__ import annotations

import collections
import csv
import gzip
import itertools
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
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
from recipes import hub
from recipes.data.sources import held_out_row
from recipes.models.configuration import set_dropout
from recipes.models.pretrained import package_folder

ACCURACY = "accuracy"


@dataclass
class Task:
    """auto: the Auto class; options: of the model's configuration. metrics: of Trainer's predictions.

    trainer, arguments: another Trainer than the usual one, and what it is told besides.
    """

    auto: Any
    options: dict[str, Any]
    train: Dataset
    held_out: Dataset
    collator: Any
    metrics: Callable[[Any], dict[str, float]]
    trainer: type[transformers.Trainer] = transformers.Trainer
    arguments: dict[str, Any] = field(default_factory=dict)


def pretrained_folder(cfg: Config) -> str:
    return package_folder(str(cfg.model.path)) or str(cfg.model.path)


def accuracy(found: Any) -> dict[str, float]:
    return {ACCURACY: float((found.predictions.argmax(-1) == found.label_ids).mean())}


def sequence_classification(cfg: Config) -> Task:
    """As transformers' run_classification.py: a tab-separated file, accuracy."""
    tokenizer = hub.tokenizer(pretrained_folder(cfg))

    def rows(path: str) -> Dataset:
        with open(path, newline="", encoding="utf-8") as file:
            pairs = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
        ids = tokenizer([text for text, _ in pairs], truncation=True, max_length=cfg.data.seq_length)
        return Dataset.from_dict({**ids, "labels": [int(label) for _, label in pairs]})

    auto, collator = transformers.AutoModelForSequenceClassification, transformers.DataCollatorWithPadding(tokenizer)
    train, held_out = rows(str(cfg.data.path)), rows(str(cfg.data.eval_path))
    return Task(auto, {"num_labels": 2}, train, held_out, collator, accuracy)


def token_classification(cfg: Config) -> Task:
    """As transformers' run_ner.py: words and tags, the first piece of a word is labelled, seqeval's F1."""
    from seqeval.metrics import f1_score

    tokenizer = hub.tokenizer(pretrained_folder(cfg))

    def read(path: str) -> list[tuple[list[str], list[str]]]:
        lines = (line.split("\t") for line in Path(path).read_text(encoding="utf-8").split("\n"))
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

    auto, collator = (
        transformers.AutoModelForTokenClassification,
        transformers.DataCollatorForTokenClassification(tokenizer),
    )
    return Task(auto, {"num_labels": len(names)}, rows(train), rows(held_out), collator, metrics)


def question_answering(cfg: Config) -> Task:
    """As transformers' run_qa.py: overlapping windows, the best of 20 × 20 starts and ends, SQuAD's F1."""
    tokenizer = hub.tokenizer(pretrained_folder(cfg))
    articles = json.loads(Path(str(cfg.data.path)).read_text(encoding="utf-8"))["data"]
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

    train, collator = windows(examples(articles[:cut]))[0], transformers.DataCollatorWithPadding(tokenizer)
    return Task(transformers.AutoModelForQuestionAnswering, {}, train, held_out_windows, collator, metrics)


def translation(cfg: Config) -> Task:
    """As transformers' run_translation.py: Seq2SeqTrainer, generation, sacrebleu; a tokenizer trained on the texts."""
    import sacrebleu
    from tokenizers import ByteLevelBPETokenizer

    def read(*paths: str | None) -> tuple[list[str], ...]:
        return tuple(gzip.open(str(path), "rt", encoding="utf-8").read().splitlines() for path in paths)

    sources, targets = read(cfg.data.path, cfg.data.target_path)
    asked, right = read(cfg.data.eval_path, cfg.data.eval_target_path)
    bytes_ = ByteLevelBPETokenizer()
    bytes_.train_from_iterator([*sources, *targets], cfg.data.vocab_size, special_tokens=["<s>", "</s>", "<pad>"],
                               show_progress=False)  # fmt: skip
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bytes_._tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    pad, start, end = (tokenizer.convert_tokens_to_ids(token) for token in ("<pad>", "<s>", "</s>"))

    def ids(texts: list[str]) -> list[list[int]]:
        return [[*one[: cfg.data.seq_length - 1], end] for one in tokenizer(texts)["input_ids"]]

    def rows(sources: list[str], targets: list[str]) -> Dataset:
        return Dataset.from_dict({"input_ids": ids(sources), "labels": ids(targets)})

    def metrics(found: Any) -> dict[str, float]:
        told = np.where(found.predictions < 0, pad, found.predictions)
        texts = [text.strip() for text in tokenizer.batch_decode(told, skip_special_tokens=True)]
        return {"bleu": float(sacrebleu.corpus_bleu(texts, [right]).score)}

    options = {"vocab_size": len(tokenizer), "pad_token_id": pad, "bos_token_id": start, "eos_token_id": end,
               "decoder_start_token_id": end, "forced_eos_token_id": None}  # fmt: skip
    making = transformers.GenerationConfig(
        max_new_tokens=cfg.eval.new_tokens, num_beams=cfg.eval.beams, pad_token_id=pad, eos_token_id=end,
        decoder_start_token_id=end,
    )  # fmt: skip
    more = {"predict_with_generate": True, "generation_config": making}
    collator = transformers.DataCollatorForSeq2Seq(tokenizer)
    train, held_out = rows(sources, targets), rows(asked, right)
    auto = transformers.AutoModelForSeq2SeqLM
    return Task(auto, options, train, held_out, collator, metrics, transformers.Seq2SeqTrainer, more)


def split(cfg: Config, columns: dict[str, np.ndarray]) -> tuple[Dataset, Dataset]:
    """Rows in two parts, those that are held out as by ours: which these are is part of the task."""
    whole = Dataset.from_dict(columns).with_format("torch")
    aside = [held_out_row(number, cfg.data.held_out) for number in range(len(whole))]
    return tuple(whole.select([n for n, out in enumerate(aside) if out == wanted]) for wanted in (False, True))  # type: ignore[return-value]


def image_classification(cfg: Config) -> Task:
    """As transformers' run_image_classification.py, on scikit-learn's digits."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = (digits.images[:, None].astype(np.float32) / 16 - 0.5) / 0.5
    train, held_out = split(cfg, {"pixel_values": pixels, "labels": digits.target})
    auto = transformers.AutoModelForImageClassification
    return Task(auto, {"num_labels": 10}, train, held_out, transformers.default_data_collator, accuracy)


def regression(cfg: Config) -> Task:
    """A straight line through 200 points. R² by hand."""
    import recipes.models.linear  # noqa: F401 - makes the linear model known to transformers

    places = np.linspace(-1, 1, 200, dtype=np.float32)
    train, held_out = split(cfg, {"features": places[:, None], "labels": 2 * places})

    def metrics(found: Any) -> dict[str, float]:
        told, right = np.ravel(found.predictions), found.label_ids
        return {"r2": float(1 - ((told - right) ** 2).sum() / ((right - right.mean()) ** 2).sum())}

    auto = transformers.AutoModelForSequenceClassification
    return Task(auto, {}, train, held_out, transformers.default_data_collator, metrics)


TASKS = {
    "sequence_classification": sequence_classification, "token_classification": token_classification,
    "question_answering": question_answering, "translation": translation,
    "image_classification": image_classification, "regression": regression,
}  # fmt: skip


def main(argv: list[str]) -> int:
    recipe, *overrides = argv
    cfg = compose([f"+recipe={recipe}", *overrides], 1)
    task = TASKS[cfg.task](cfg)
    transformers.set_seed(cfg.seed)
    optimizer = cfg.optimizer
    seq2seq = task.trainer is not transformers.Trainer
    arguments = (transformers.Seq2SeqTrainingArguments if seq2seq else transformers.TrainingArguments)(
        output_dir=tempfile.mkdtemp(), seed=cfg.seed, num_train_epochs=float(cfg.train.epochs or 0),
        max_steps=cfg.train.steps or -1,
        per_device_train_batch_size=cfg.batch.global_size, per_device_eval_batch_size=cfg.eval.micro_size or 8,
        learning_rate=optimizer.lr, weight_decay=optimizer.weight_decay, adam_beta1=optimizer.betas[0],
        adam_beta2=optimizer.betas[1], adam_epsilon=optimizer.eps, max_grad_norm=optimizer.gradient_clipping,
        lr_scheduler_type=cfg.scheduler.name, warmup_steps=cfg.scheduler.warmup_steps, use_cpu=True, report_to="none",
        logging_strategy="no", save_strategy="no", disable_tqdm=True, dataloader_pin_memory=False, **task.arguments,
    )  # fmt: skip
    if cfg.model.path:
        folder = pretrained_folder(cfg)
        config = set_dropout(hub.config(folder, **task.options), cfg.model.dropout)
        model = hub.model(task.auto, folder, config=config)
    else:
        config = transformers.AutoConfig.for_model(cfg.model.type, **{**cfg.model.config, **task.options})
        model = hub.new_model(task.auto, set_dropout(config, cfg.model.dropout))
    loop = task.trainer(model, arguments, task.collator, task.train, task.held_out, compute_metrics=task.metrics)
    started = time.perf_counter()
    loop.train()
    found = {key.removeprefix("eval_"): value for key, value in loop.evaluate().items()}
    print(json.dumps({**found, "trainer_s": time.perf_counter() - started}))
    return 0


if __name__ == "__main__":
    run(main)
