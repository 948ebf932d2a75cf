"""Hub data sets: any name that `datasets.load_dataset` knows, also from its cache or a local folder."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from conf.errors import Problem, RequestError, did_you_mean
from recipes import durable, hub
from recipes.data.network import offline_without_network
from recipes.data.readers import Record, good_rows
from recipes.data.rows import Meter, Problems, Row, missing_columns
from recipes.data.sources import Source, held_out_row
from recipes.data.values import assigned

OFFLINE = (
    "data=jsonl data.path=FILE (or text, csv, parquet) reads local files; a data set that was loaded before is found "
    "in the cache of HF_HOME, which can be copied from a machine with a network"
)


class HubSource(Source):
    """Rows of `name`/`subset`: `split` for training, `eval_split` (or a share of `split`) held out."""

    @property
    def name(self) -> str:
        return str(self.config.name)

    def check(self) -> list[Problem]:
        if self.config.name:
            return []
        return [
            Problem(f"{self.key}.name", "null", "hub data needs the name of a data set", f"{self.key}.name=OWNER/NAME")
        ]

    def in_both_splits(self, others: Sequence[Source] = ()) -> Problem | None:
        if self.config.eval_split != self.config.split:
            return None
        rule = "this is the training split, too: held-out rows would be learned"
        return Problem(f"{self.key}.eval_split", str(self.config.eval_split), rule, "another split, or null")

    def fingerprint(self) -> str:
        revision = [self.config.revision] if self.config.revision else []
        return " ".join([*revision, *(split._fingerprint for _, _, split in self._splits())])

    def origins(self) -> list[str]:
        return [f"{self.name}[{split}]" for split in (self.config.split, self.config.eval_split) if split is not None]

    def size(self) -> int:
        return sum(len(split) for _, _, split in self._splits())

    def read(self, problems: Problems, meter: Meter) -> Iterator[Row]:
        splits = self._splits()
        index = 0
        for held_out, name, split in splits:
            origin = f"{self.name}[{name}]"
            missing = missing_columns(self.fields, self.key, split.column_names, origin)
            if missing:
                raise RequestError(missing)
            names = set(split.column_names)
            columns = [c if c in names else c.partition(".")[0] for c in self.fields.columns.values()]
            columns += [name for name in self.fields.also if name in names]
            records = _records(split.select_columns(list(dict.fromkeys(columns))), meter)
            for number, content in good_rows(records, origin, self.fields, problems, meter):
                aside = held_out_row(index, self.held_out) if len(splits) == 1 else held_out
                yield Row(f"{origin}:{number}", aside, content)
                index += 1

    def _splits(self) -> list[tuple[bool, str, Any]]:
        """(held out, name of the split, data set)."""
        splits = [(False, self.config.split, self._load("split", self.config.split))]
        if self.config.eval_split is not None:
            splits.append((True, self.config.eval_split, self._load("eval_split", self.config.eval_split)))
        return splits

    def _load(self, key: str, split: str) -> Any:
        if not Path(self.name).exists():
            offline_without_network()
        import datasets

        self._check_cache(Path(datasets.config.HF_DATASETS_CACHE))
        try:
            return hub.dataset(self.name, self.config.subset, split, revision=self.config.revision)
        except (ConnectionError, FileNotFoundError, OSError) as error:
            if (revision := self.config.revision) and "revision" in _first_line(error).lower():
                rule = f"this data set has no such branch, tag or commit ({_first_line(error)})"
                raise RequestError(
                    Problem(f"{self.key}.revision", revision, rule, f"{self.key}.revision=null")
                ) from error
            rule = f"this data set was not found, neither on the hub nor in the cache ({_first_line(error)})"
            raise RequestError(Problem(f"{self.key}.name", self.name, rule, OFFLINE)) from error
        except ValueError as error:
            raise RequestError(self._wrong_choice(key, split, _first_line(error))) from error
        except RuntimeError as error:  # datasets runs no code of strangers
            rule = f"this data set cannot be read ({_first_line(error)})"
            nearest = "a copy of it in Parquet: many sets that were scripts have one, under another owner"
            raise RequestError(Problem(f"{self.key}.name", self.name, rule, nearest)) from error

    def _check_cache(self, cache: Path) -> None:
        """`datasets` writes each set down in its own format before a row is read."""
        try:
            durable.make_folder(cache)
            if not os.access(cache, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        except OSError as error:
            rule = f"data sets of the hub cannot be kept there ({error.strerror})"
            raise RequestError(Problem("HF_HOME", str(cache), rule, "HF_HOME=FOLDER on a writable disk")) from error

    def _wrong_choice(self, key: str, split: str, message: str) -> Problem:
        """`datasets` says what there is in brackets: Unknown split "x". Should be one of ['train', 'test']."""
        known = [word.strip(" '\"") for word in message[message.find("[") + 1 : message.rfind("]")].split(",")]
        value = self.config.subset or ""
        if "split" in message.lower() and split in message:
            value = split
        else:
            key = "subset"
        nearest = did_you_mean(value, known) or known[0]
        return Problem(f"{self.key}.{key}", value, message, assigned(f"{self.key}.{key}", nearest) if nearest else "")


def _records(split: Any, meter: Meter) -> Iterator[Record]:
    classes = {column: names for column, feature in split.features.items() if (names := _class_names(feature))}
    number = 0
    for table in split.with_format("arrow").iter(batch_size=1024):
        for record in table.to_pylist():
            number += 1
            for column, names in classes.items():
                record[column] = _named(record[column], names)
            yield number, record
        meter.done += table.num_rows


def _class_names(feature: Any) -> list[str] | None:
    """The names of the classes of a column of classes, or of lists of them."""
    return getattr(feature, "names", None) or getattr(getattr(feature, "feature", None), "names", None)


def _named(value: Any, names: list[str]) -> Any:
    """The name of a class; None for -1, which stands for a label that is not given away."""
    if isinstance(value, list):
        return [_named(one, names) for one in value]
    return names[value] if value is not None and value >= 0 else None


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
