"""What recipes of labelled examples share: rows become examples once, examples become batches, logits predictions.

A recipe says which columns and kinds of data it reads, how a row is encoded, what its loss is and how logits are read.
"""

from __future__ import annotations

import functools
import re
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from conf.batch import sizes
from conf.errors import Problem, RequestError, did_you_mean
from conf.rules_values import changed, shown
from conf.schema import Config, DataConfig, SourceConfig
from recipes.base import Prediction, Progress, Recipe
from recipes.data import readable
from recipes.data.changes import CHANGED, DOUBTFUL, check_dropped, lines, recorded, reported
from recipes.data.classes import (
    class_names,
    doubtful,
    in_order,
    near_duplicates,
    normalised,
    order_of_classes,
    told_apart,
)
from recipes.data.examples import SPLITS, Example, Examples, Shuffled, by_length, encoded
from recipes.data.readable import Reading
from recipes.data.rows import Fields, Meter, Problems, Row
from recipes.data.sources import Source
from recipes.data.values import assigned

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

IGNORE = -100
FORMAT = 10
"""Part of every name in the cache: raise it when examples of the same data would come out differently."""
REWRITTEN = 20
"""Ways of writing a class that are said."""
RECORDS = dict.fromkeys(("jsonl", "csv", "parquet", "hub"), "recipes.data.sources:RecordSource")
RECORDS["hub"] = "recipes.data.hub:HubSource"
OF_ALL = ("seq_length", "held_out", "max_files", "cache_dir", "max_dropped", "max_unreadable")
GENERAL = (*OF_ALL, "overlong", "empty", "bucketing")
"""Keys of `data` that every task reads, and every task of examples."""
NOT_OF_ROWS = (
    "cache_dir", "bucketing", "max_dropped", "max_unreadable", "max_expansion", "max_pixels", "chat_date",
    "chat_options", "revision", "path", "eval_path", "target_path", "eval_target_path",
)  # fmt: skip
"""Keys of `data` that change no example, or that are in a source's own fingerprint: of files the content decides."""
OF_LANGUAGE_MODELS = ("text", "prompt", "completion", "messages", "weight", "chat_date", "chat_options")
"""Keys of data that only language models read, unless a task names them among its own."""


COLUMNS = (
    "text", "pair", "label", "tokens", "question", "context", "answers", "source", "target", "image",
    "target_path", "eval_target_path",
)  # fmt: skip
"""Keys of `data` that name the columns of records, or say where the other half of the rows is."""
OTHER_HALF = ("target_path", "eval_target_path")
APART = ("eval_path", "eval_split", "eval_target_path")
"""And those of rows that are held out instead of a share of the others."""
READ_BY = {"conll": ("tokens", "label"), "lines": OTHER_HALF, "idx": OTHER_HALF}
"""Kind of data → those of them that it reads, where it does not read records."""
NO_TEXT = ("data.seq_length", "data.overlong", "data.bucketing", "data.vocab_size", "model.tokenizer")
"""Keys that only tasks with texts use."""


class Supervised(Recipe):
    """A task whose rows are examples with labels."""

    KINDS: ClassVar[Mapping[str, str]] = RECORDS
    """Kind of data → `module:class` of its source."""
    KEYS: ClassVar[tuple[str, ...]] = ()
    """Keys of `data` that this task reads besides the general ones."""
    ALSO: ClassVar[tuple[str, ...]] = ()
    """Columns of records that are taken along where they are there."""
    CLASSES: ClassVar[bool] = True
    """Whether what `labels_of` gives are the outputs of a model."""
    ARRAYS: ClassVar[Mapping[str, str]] = {}
    """Arrays of an example → their dtype on disk."""
    LENGTHS: ClassVar[tuple[str, ...]] = ()
    """The arrays whose lengths are made similar within a batch."""
    WINDOW: ClassVar[int] = 64
    """Global batches whose rows are sorted by length together: enough for little padding, few enough to stay shuffled.
    One where a row has as many targets as tokens: a batch of rows of one length teaches that length, and in a batch of
    short rows each of their targets would weigh more."""
    UNUSED: ClassVar[tuple[str, ...]] = ("data.packing", "train.fused_loss", "eval.prompt")
    """Keys that only other tasks use."""
    held_out: Examples
    labels: list[str]
    """Names of the classes, in the order of their numbers; empty where there are none."""

    # Data

    @abstractmethod
    def columns(self) -> dict[str, str]:
        """Name inside a row (and of the key of `data`) → the column of a record."""

    def check_values(self, content: dict[str, Any], where: str, columns: dict[str, str]) -> list[Problem]:
        """What is wrong with the values of one record; text is text by default."""
        from recipes.data.rows import check_content

        return check_content(content, where, columns)

    def is_empty(self, content: dict[str, Any]) -> bool:
        """Whether there is nothing to learn in a row without a blank column."""
        return False

    @abstractmethod
    def encode(self, rows: Sequence[Row], problems: Problems, meter: Meter) -> list[list[Example]]:
        """The examples of each row; broken rows go to `problems`."""

    def reading(self) -> Reading | None:
        """What measures how much of the rows can be read; None for rows without text."""
        return None

    def measure(self, reading: Reading, row: Row, examples: list[Example]) -> None:
        """Measure one row, with the examples that were made of it."""

    def labels_of(self, content: dict[str, Any]) -> Iterator[Any]:
        """The classes that a row has, as they are written there, for tasks with classes."""
        yield from ()

    def classes_of(self, content: dict[str, Any]) -> Iterator[str]:
        """The names of the classes that a row has."""
        yield from map(self.named, self.labels_of(content))

    @functools.cached_property
    def _given(self) -> list[str] | None:
        """`data.labels`, by the names that classes have here."""
        return None if self.cfg.data.labels is None else [normalised(name) for name in self.cfg.data.labels]

    def ready(self, root: Path, source: Source, fingerprint: str, progress: Progress) -> list[str]:
        """Make what encoding needs (a tokenizer), and return what the examples depend on beside data and task."""
        return []

    def check(self) -> list[Problem]:
        problems = [*self._check_keys(), *self._check_run()]
        if problems:
            return problems
        return self.source().check()

    def _check_keys(self) -> Iterator[Problem]:
        data = self.cfg.data
        if data.kind not in self.KINDS:
            near = did_you_mean(data.kind, self.KINDS) or next(iter(self.KINDS))
            rule = f"{self.cfg.task} reads {', '.join(self.KINDS)}"
            yield Problem("data.kind", data.kind, rule, f"data={near}")
        yield from foreign_keys(self.cfg, self.KEYS)
        if twice := [name for name, count in Counter(self._given or ()).items() if count > 1]:
            rule, once = f"'{twice[0]}' stands there twice", dict.fromkeys(self._given or ())
            yield Problem("data.labels", f"[{','.join(data.labels or ())}]", rule, assigned("data.labels", once))
        for name in self.KEYS if data.kind in self.KINDS and data.kind not in RECORDS else ():
            if name in COLUMNS and name not in READ_BY.get(data.kind, ()) and changed(data, name):
                rule = f"{data.kind} data has no columns with names"
                yield Problem(f"data.{name}", shown(getattr(data, name)), rule, f"data.{name}={_default(data, name)}")
        if data.kind in RECORDS:
            for name in OTHER_HALF:
                if getattr(data, name):
                    yield Problem(f"data.{name}", getattr(data, name), f"{data.kind} data is in one file", "data=lines")
            for name, column in self.columns().items():
                if not column:
                    yield Problem(f"data.{name}", "null", f"{data.kind} data needs it", f"data.{name}=COLUMN")

    def _check_run(self) -> Iterator[Problem]:
        cfg = self.cfg
        if cfg.parallel.sequence > 1:
            rule = f"sequences of {cfg.task} are not divided"
            yield Problem("parallel.sequence", str(cfg.parallel.sequence), rule, "parallel.sequence=1")
        for key in self.UNUSED:
            group, _, name = key.partition(".")
            section = getattr(cfg, group)
            if changed(section, name):
                rule = f"{cfg.task} does not use it"
                yield Problem(key, shown(getattr(section, name)), rule, f"{key}={_default(section, name)}")

    def source(self, data: DataConfig | None = None) -> Source:
        """Where the rows come from; data: instead of the configuration's."""
        module, _, name = self.KINDS[self.cfg.data.kind].partition(":")
        kind = getattr(import_module(module), name)
        data = data or self.cfg.data
        wanted = Fields(
            {name: column for name, column in self.columns().items() if column}, self.check_values, self.is_empty,
            ("label",) if self.cfg.data.multi_label else (), self.ALSO, self.cfg.data.empty == "refuse",
        )  # fmt: skip
        return kind(data, "data", data.held_out, data.max_files, wanted)

    def prepare(self, progress: Progress | None = None) -> None:
        from recipes.data.cache import identified, key_of
        from recipes.data.store import ROWS, default_cache_dir
        from recipes.models.pretrained import local_folder

        cfg, data = self.cfg, self.cfg.data
        report = progress or (lambda done, total, what: None)
        root = Path(data.cache_dir).expanduser() if data.cache_dir else default_cache_dir()
        self._folder = local_folder(cfg.model, progress) if cfg.model.path else None
        source = self.source()
        settings = {name: value for name, value in asdict(data).items() if name not in NOT_OF_ROWS}
        try:
            if not self.finished and (problem := source.in_both_splits()):
                raise RequestError(problem)
            content = source.fingerprint()
            fingerprint = key_of(FORMAT, cfg.task, settings, content)
            self.labels, self._counts = self._find_labels(root, source, fingerprint)
            changes = reported(self._rewritten, source.name, source.origins())
            depends = self.ready(root, source, fingerprint, report)
            name = f"examples-{key_of(fingerprint, self.labels, depends)}"
            store = encoded(root, name, source, self.ARRAYS, self.encode, report, self.reading(), self.measure)
            alone = self.source(replace(data, eval_path=None, eval_split=None, eval_target_path=None))
            rows = identified(root, [source], [alone], [content])
        except OSError as error:
            raise RequestError(
                Problem(str(error.filename or "data"), "", f"cannot be read ({error.strerror})")
            ) from error
        changes += reported(store.facts["changes"], source.name, source.origins())
        self.report = {
            "fingerprint": ROWS + key_of(store.content, self.labels),
            "source": source.name,
            "labels": self._counts,
        }
        self.report |= {split: store.facts[split] for split in SPLITS} | {"changes": changes}
        if problems := check_dropped(changes, "data", store.facts["rows"], data.max_dropped):
            raise RequestError(problems)
        unreadable = self.report["unreadable"] = readable.reported(
            store.facts["unreadable"], "data", source.name, source.origins()
        )
        if not self.finished and (
            problems := readable.check_readable(unreadable, data.max_unreadable, self._folder is not None)
        ):
            raise RequestError(problems)
        self.report["rows"] = rows
        for split in SPLITS:
            if not store.facts[split]:
                rule = f"the {split.replace('_', '-')} split has no rows"
                raise RequestError(Problem("data", source.name, rule, "more data, or data.eval_path=FILE"))
        train = Examples(store, "train", self.ARRAYS)
        held_out = Examples(store, "held_out", self.ARRAYS)
        bucketed = bool(self.LENGTHS) and data.bucketing
        lengths = self.lengths(train) if bucketed else None
        self.train = Shuffled(train, cfg.seed, sizes(cfg.batch)[0], lengths, self.WINDOW)
        self.held_out = held_out
        self._order = by_length(self.lengths(held_out))[::-1].tolist() if bucketed else range(len(held_out))
        if problems := self.check_model() + self._check_size():
            raise RequestError(problems)

    def lengths(self, examples: Examples) -> list[np.ndarray]:
        """(N,) for each array of an example that is padded by itself."""
        return [examples.lengths(name) for name in self.LENGTHS]

    def held_out_order(self) -> Sequence[int]:
        """The longest rows first: a batch has rows of similar length, and what is too much for memory shows early."""
        return self._order

    def _check_size(self) -> list[Problem]:
        rows, size = len(self.train), sizes(self.cfg.batch)[0]
        if rows >= size or self.finished:
            return []
        rule = f"one global batch is more than the whole training split, which has {rows} rows"
        return [Problem("batch.global_size", str(size), rule, f"batch.global_size={rows}, or more data")]

    def _find_labels(self, root: Path, source: Source, fingerprint: str) -> tuple[list[str], dict[str, int]]:
        """(names of the classes, training rows of each). Raises RequestError for a named class without a row."""
        from recipes.data.store import entry

        def build(folder: Path) -> dict[str, Any]:
            problems, meter, counts, rows, total = Problems(), Meter(source.size()), dict[str, int](), 0, 0
            changes = Meter()
            for row in source.read(problems, meter):
                rows, total = rows + (not row.held_out), total + 1
                labels = list(self.labels_of(row.content))
                if self.CLASSES and (wrong := self._named_like_its_column(labels, row.where)):
                    problems.add(wrong)
                other = next((label for label in labels if normalised(label) != str(label).strip()), None)
                if other is not None:
                    what = f"labels read by their value, {normalised(other)!r} for {other!r}"
                    changes.note(CHANGED, what, row.where)
                for name in map(self.named, labels) if self.CLASSES else ():
                    if name not in (self._given or ()) and (what := doubtful(name)):
                        changes.note(DOUBTFUL, what, row.where)
                for label in map(self.named, labels) if not row.held_out else ():
                    counts[label] = counts.get(label, 0) + 1
            problems.raise_any()
            found = list(changes.changes.values())[:REWRITTEN]
            return {"counts": counts, "rows": rows, "changes": recorded(found, source.origins(), total)}

        facts = entry(root, f"labels-{fingerprint}", build).facts
        counts, self._rewritten = facts["counts"], facts["changes"]
        given = self._given
        if not self.CLASSES or type(self).labels_of is Supervised.labels_of:
            return list(given or []), counts
        if not counts and not self.finished:
            rule = "no training row has a class"
            raise RequestError(Problem("data", source.name, rule, "more data, or data.eval_path=FILE"))
        names = class_names(self._folder) if self._folder is not None else None
        if self.finished:
            given = order_of_classes(given, names, counts)
        elif (
            given and names and (order := in_order(names, given)) and order != given and sorted(order) == sorted(given)
        ):
            rule = f"the head of {self.cfg.model.path} has them in another order"
            raise RequestError(Problem("data.labels", f"[{','.join(given)}]", rule, assigned("data.labels", order)))
        given = given or (in_order(names, counts) if names else None)
        if len(given or counts) == 1 and not self.cfg.data.multi_label and not self.finished:
            rule = f"all training rows are of one class ('{next(iter(counts))}'): there is nothing to tell apart"
            raise RequestError(Problem("data", source.name, rule, "rows of other classes"))
        if self.cfg.data.multi_label and not self.finished and set(counts.values()) == {facts["rows"]}:
            rule = f"every training row has each of the classes ({', '.join(counts)}): there is nothing to tell apart"
            raise RequestError(Problem("data.label", source.name, rule, "the classes of a row alone: [1], not [0, 1]"))
        if self.cfg.data.multi_label and not self.finished:
            for name in counts:
                if len(parts := {part.strip() for part in re.split("[,;]", name)}) > 1 and parts <= counts.keys():
                    rule = f"the classes {', '.join(sorted(parts))} of one row, taken for one class"
                    raise RequestError(Problem("data.label", f"'{name}'", rule, f"'{'|'.join(sorted(parts))}'"))
        if given is None:
            return sorted(counts, key=_natural), counts
        without = [name for name in self._given or () if name not in counts]
        if without and not self.finished:
            rule = "a class without an example in the training rows"
            near = did_you_mean(without[0], counts)
            raise RequestError(
                Problem("data.labels", name, rule, f"{near}?" if near else f"one of {', '.join(counts)}")
                for name in without
            )
        return list(given), counts

    def _named_like_its_column(self, labels: list[Any], where: str) -> Problem | None:
        """A row whose class is the name of its column: a header among the rows, unless `data.labels` names it."""
        columns = self.columns() if self.cfg.data.kind in RECORDS else {}
        column = columns.get("label") or columns.get("tags")
        name = column and normalised(column.rpartition(".")[2]).casefold()
        if not name or all(normalised(label).casefold() != name for label in labels):
            return None
        if any(label.casefold() == name for label in self._given or ()):
            return None
        rule = f"its class is the name of column '{column}', as in a header"
        return Problem(where, "", rule, "a file without this line, or data.labels=[…] with this class, if it is one")

    def named(self, label: Any) -> str:
        """The name of a class that a row gives by its name or, where `data.labels` names them, by its number."""
        name, given = normalised(label), self._given
        numbered = given and not any(one.isdecimal() for one in given)
        if given and numbered and name not in given and name.isascii() and name.isdecimal() and int(name) < len(given):
            return given[int(name)]
        return name

    def number_of(self, label: str, where: str, problems: Problems) -> int | None:
        """The number of a class, or None and a problem."""
        try:
            return self._numbers[label]
        except KeyError:
            near = did_you_mean(label, self.labels)
            shown_labels = ", ".join(self.labels[:12]) + ("…" if len(self.labels) > 12 else "")
            rule = f"not in the label set ({shown_labels})"
            nearest = "mend the row, or have training rows of this class"
            problems.add(Problem(where, repr(label), rule, f"'{near}'" if near else nearest))
            return None

    @property
    def _numbers(self) -> dict[str, int]:
        if not hasattr(self, "_label_numbers"):
            self._label_numbers = {label: number for number, label in enumerate(self.labels)}
        return self._label_numbers

    def sides(self, predictions: Sequence[Prediction]) -> tuple[list[int], list[int]]:
        """The numbers of the classes that were predicted, and of those that are right, for rows of one class each."""
        predicted, right = ([self._numbers[row[side]] for row in predictions] for side in ("prediction", "label"))
        return predicted, right

    def class_tables(self, predictions: Sequence[Prediction]) -> dict[str, Any]:
        """What `details` gives where each row has one class."""
        from recipes.scores import confusion, per_label

        predicted, right = self.sides(predictions)
        return {
            "per_label": per_label(predicted, right, self.labels),
            "confusion": confusion(predicted, right, len(self.labels)),
        }

    def said(self) -> str | None:
        said = lines(self.report["changes"]) + readable.lines(self.report["unreadable"])
        return "\n".join(["; ".join(self.remarks()), *self.notes, *said])

    def remarks(self) -> list[str]:
        """What is said of the rows in one line."""
        counts = [f"{self.report['train']:,} training examples, {self.report['held_out']:,} held out"]
        if self.labels:
            each = [f"{name} {self._counts.get(name, 0):,}" for name in self.labels[:12]]
            counts.append(f"classes: {', '.join(each)}{', …' if len(self.labels) > 12 else ''}")
        if self.CLASSES and (near := near_duplicates(self._counts)):
            each = [
                " and ".join(
                    f"{told_apart(name, other)} ({self._counts[name]:,})" for name, other in (pair, pair[::-1])
                )
                for pair in near[:6]
            ]
            counts.append(f"classes that may be one, written in two ways: {', '.join(each)}")
        return counts

    # Model

    def model_config(self) -> PretrainedConfig:
        from recipes.models.configuration import scratch_config, set_dropout
        from recipes.models.pretrained import pretrained_config

        if self._folder:
            config = pretrained_config(self.cfg.model, self._folder)
        else:
            assert self.cfg.model.type is not None  # a rule: one of type and path is given
            config = scratch_config(self.cfg.model.type, {**self.scratch_defaults(), **self.cfg.model.config})
            set_dropout(config, self.cfg.model.dropout)
        self.set_heads(config)
        return config

    def scratch_defaults(self) -> dict[str, Any]:
        """Attributes of a new model's configuration that the data decide."""
        return {}

    def set_heads(self, config: PretrainedConfig) -> None:
        """What the configuration says of the head: its classes and their names."""
        if self.labels:
            config.id2label = dict(enumerate(self.labels))
            config.label2id = {name: number for number, name in enumerate(self.labels)}

    def check_model(self) -> list[Problem]:
        """What only the model's own configuration can tell."""
        from recipes.models.configuration import check_buildable

        return check_buildable(
            self.hf_class(), self.model_config(), self.cfg, trained=not self.finished, weights=self._folder,
            new_head=self.new_head(), notes=self.notes,
        )  # fmt: skip

    def weights(self) -> Path | None:
        return self._folder

    def new_head(self) -> bool:
        return not self.finished

    def adopt(self, model: PreTrainedModel) -> None:
        pass

    # Batches, loss and predictions

    def width(self, batch: Mapping[str, np.ndarray]) -> int:
        return 0

    def widen(self, batch: dict[str, np.ndarray], width: int) -> dict[str, np.ndarray]:
        return batch

    @abstractmethod
    def summed_loss(self, outputs: Any, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The loss of a batch from the model's outputs, a sum over what is supervised, fp32."""

    @abstractmethod
    def read(self, outputs: Any, batch: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
        """What of the model's outputs `predictions` needs, each of (B, …)."""

    def call(self, model: Any, batch: Mapping[str, torch.Tensor]) -> Any:
        """The model's outputs."""
        return model(**self.inputs(batch))

    def loss(self, model: Any, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return self.summed_loss(self.call(model, batch), batch)

    def evaluate(self, model: Any, batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, np.ndarray]]:
        outputs = self.call(model, batch)
        return self.summed_loss(outputs, batch), self.read(outputs, batch)

    def metrics(self, loss: float, supervised: int, predictions: Sequence[Prediction] = ()) -> dict[str, float]:
        return {"loss": loss, **self.scores(predictions)}

    @abstractmethod
    def scores(self, predictions: Sequence[Prediction]) -> dict[str, float]:
        """Named metrics of the predictions for all held-out rows."""


def foreign_keys(cfg: Config, own: Sequence[str], general: Sequence[str] = GENERAL) -> Iterator[Problem]:
    """Keys of `data` that are set and that this task does not read."""
    readers = {field.name for field in fields(SourceConfig)} - set(OF_LANGUAGE_MODELS)
    known = {*readers, *general, *own, "vocab_size", "packing", "mixture"}
    for field in fields(DataConfig):
        default = field.default_factory() if callable(field.default_factory) else field.default
        value = getattr(cfg.data, field.name)
        if field.name in known or value == default:
            continue
        rule = f"{cfg.task} does not read it; it reads {', '.join(own) or 'no columns'}"
        yield Problem(f"data.{field.name}", shown(value), rule, f"data.{field.name}={shown(default)}")


def _default(section: Any, name: str) -> str:
    """The default of a key, as it is written on the command line."""
    return shown(next(field.default for field in fields(section) if field.name == name))


def _natural(label: str) -> tuple[int, float, str]:
    """Numbers in their order, before words in theirs."""
    try:
        return 0, float(label), label
    except ValueError:
        return 1, 0.0, label
