"""Data made ready for training: tokenised once, kept by content, packed, opened by every rank.

The cache has three kinds of entries: the tokenizer trained on the data, the tokens of each source (independent of the
sequence length), and the packing of one split of a source. Each is named after everything it depends on.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from conf.errors import Problem, RequestError
from conf.schema import DataConfig
from recipes import hub
from recipes.data import readable
from recipes.data.changes import CUT, DROPPED, check_dropped, enough, recorded, reported
from recipes.data.encode import Encoded, Encoder
from recipes.data.order import MixedDataset, SampleOrder
from recipes.data.packing import Packing, SequenceSet, Tokens, pack, widths
from recipes.data.readable import Reading
from recipes.data.rows import Meter, Problems, Row, column_keys, fills_up
from recipes.data.sources import REMEMBERED, Source, open_source, open_sources
from recipes.data.store import ROWS, ArrayWriter, Entry, default_cache_dir, entry, writing
from recipes.data.tokenizer import id_count, tokenizer_digest, train_tokenizer
from recipes.durable import new_file

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT = 4
"""Part of every name in the cache: raise it when tokens or packings of the same data would come out differently."""
SPLITS = ("train", "held_out")
PLACES = {"origin": "int32", "line": "int64"}
"""Where each document stands, of those that may be cut or dropped: `Source.origins`, and the line or row there."""
REASONS = {
    "beyond": (DROPPED, "rows in which nothing to learn comes within data.seq_length={}"),
    "unsupervised": (DROPPED, "rows with nothing to learn"),
    "truncated": (CUT, "rows truncated to data.seq_length={}"),
}
"""Counts of a packing → what became of these rows, and why."""
BATCH_CHARACTERS = 1 << 22
BATCH_ROWS = 4096
FORMAT_KEYS = (
    "kind",
    "text",
    "prompt",
    "completion",
    "messages",
    "delimiter",
    "header",
    "quoting",
    "encoding",
    "subset",
    "split",
    "eval_split",
)
"""Settings of a source that change its rows; where the rows come from is in its fingerprint."""
Progress = Callable[[int, int, str], None]
"""Called with (done, total, what is being done)."""


@dataclass
class Prepared:
    """Data ready for training.

    train: one set of sequences per source, with its weight. held_out: those of all sources, one after the other.
    report: documents, tokens, sequences, padding and what was left out, per source and split; JSON values.
    """

    train: list[SequenceSet]
    weights: list[float]
    held_out: SequenceSet
    tokenizer: PreTrainedTokenizerBase
    report: dict[str, Any]
    seed: int

    def order(self) -> SampleOrder:
        """The order in which training reads the sequences."""
        return SampleOrder(self.seed, [len(sequences) for sequences in self.train], self.weights)

    def dataset(self) -> MixedDataset:
        """Training sequences by global sample index."""
        return MixedDataset(self.train, self.order())


def prepare(
    data: DataConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    seed: int,
    vocab_size: int | None = None,
    progress: Progress | None = None,
) -> Prepared:
    """Tokenise and pack the data, or open what an earlier run has left in the cache.

    tokenizer: None trains one of `vocab_size` entries on the training split. seed: of the order. Every rank may call
    this at the same time; one does the work. Raises RequestError with all problems found in the data.
    """
    report_to = progress or (lambda done, total, what: None)
    root = Path(data.cache_dir).expanduser() if data.cache_dir else default_cache_dir()
    sources, own = open_sources(data), tokenizer is None
    try:
        contents = [source.fingerprint() for source in sources]
        fingerprints = [_fingerprint(*each, data) for each in zip(sources, contents, strict=True)]
        if tokenizer is None:
            tokenizer = _trained(root, sources, fingerprints, vocab_size, report_to)
        stores = _tokenised(root, sources, fingerprints, tokenizer, data, own, report_to)
    except OSError as error:
        raise RequestError(Problem(str(error.filename or "data"), "", f"cannot be read ({error.strerror})")) from error
    packed = [{split: _packed(root, store, split, data, report_to) for split in SPLITS} for store in stores]
    changes = [_changes(*each, data) for each in zip(sources, stores, packed, strict=True)]
    problems: list[Problem] = []
    for source, store, found in zip(sources, stores, changes, strict=True):
        problems += check_dropped(found, source.key, store.facts["rows"], data.max_dropped)
    if problems:
        raise RequestError(problems)
    _require_sequences(sources, packed)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id

    def sequences(parts: list[tuple[Tokens, Packing]]) -> SequenceSet:
        return SequenceSet(parts, data.seq_length, data.packing, pad)

    rows = identified(root, sources, [_without_held_out(source, data) for source in sources], contents)
    train = [sequences([parts["train"]]) for parts in packed]
    held_out = sequences([parts["held_out"] for parts in packed])
    report = {
        "vocab_size": id_count(tokenizer),
        "fingerprint": ROWS + key_of(*(store.content for store in stores)),
        "rows": rows,
        "sources": [_source_report(*item, data) for item in zip(sources, packed, strict=True)],
        "changes": [change for found in changes for change in found],
        "unreadable": [
            share for source, store in zip(sources, stores, strict=True)
            for share in readable.reported(store.facts["unreadable"], source.key, source.name, source.origins())
        ],
    }  # fmt: skip
    return Prepared(train, [source.config.weight for source in sources], held_out, tokenizer, report, seed)


def identified(
    root: Path, sources: Sequence[Source], training: Sequence[Source], fingerprints: Sequence[str]
) -> dict[str, list[str]]:
    """What a run remembers of its rows, so that they are known again under any name: {"sources": what identifies the
    rows of each source and their split, "files" and "held_out": the content of its files, as of `Source.digests`}.

    training: the sources without what is held out apart. fingerprints: those of `sources`.
    """

    def build(folder: Path) -> dict[str, Any]:
        files = {
            name: sorted({content for source in sources for content in source.digests(held_out)})[:REMEMBERED]
            for name, held_out in (("files", False), ("held_out", True))
        }
        return {"sources": [key_of(source.identity()) for source in training], **files}

    name = key_of(FORMAT, [source.config.kind for source in sources], list(fingerprints))
    return entry(root, f"contents-{name}", build).facts


def _without_held_out(source: Source, data: DataConfig) -> Source:
    return open_source(replace(source.config, eval_path=None, eval_split=None), source.key, data)


def _fingerprint(source: Source, content: str, data: DataConfig) -> str:
    settings = {name: getattr(source.config, name) for name in FORMAT_KEYS}
    return key_of(FORMAT, settings, data.held_out, content)


def _trained(
    root: Path, sources: list[Source], fingerprints: list[str], vocab_size: int | None, progress: Progress
) -> PreTrainedTokenizerBase:
    """The tokenizer trained on the training split of all sources together."""
    if vocab_size is None:
        raise ValueError("a tokenizer cannot be trained without a vocab_size")
    chats = [source for source in sources if source.config.messages is not None]
    if chats:
        rule = "a tokenizer trained from scratch has no chat template for messages"
        nearest = "model.tokenizer=NAME of one with a template, or prompt and completion columns"
        raise RequestError(Problem(f"{s.key}.messages", str(s.config.messages), rule, nearest) for s in chats)

    return trained_tokenizer(root, fingerprints, lambda: _texts(sources, progress), vocab_size)


def trained_tokenizer(
    root: Path, fingerprints: list[str], texts: Callable[[], Iterator[str]], vocab_size: int
) -> PreTrainedTokenizerBase:
    """A tokenizer trained on `texts`, which are those of the data with these fingerprints; trained once."""
    import tokenizers

    def build(folder: Path) -> dict[str, Any]:
        trained = train_tokenizer(texts(), vocab_size)
        with writing(folder):
            trained.save_pretrained(str(folder))
        return {"vocab_size": len(trained)}

    name = key_of(FORMAT, tokenizers.__version__, vocab_size, fingerprints)
    return hub.trained_tokenizer(entry(root, f"tokenizer-{name}", build).folder)


def _texts(sources: list[Source], progress: Progress) -> Iterator[str]:
    """Every text of the training split; raises RequestError at the end when rows were broken."""
    problems = Problems()
    for source in sources:
        meter = Meter(source.size())
        for row in source.read(problems, meter):
            if not row.held_out:
                yield from row.content.values()
                progress(*source.read_so_far(meter, "training the tokenizer on"))
    problems.raise_any()


def _tokenised(
    root: Path,
    sources: list[Source],
    fingerprints: list[str],
    tokenizer: PreTrainedTokenizerBase,
    data: DataConfig,
    own: bool,
    progress: Progress,
) -> list[Entry]:
    """The tokens of each source; the problems of all sources are raised together."""
    digest = tokenizer_digest(tokenizer)
    stores, problems = [], []
    for source, fingerprint in zip(sources, fingerprints, strict=True):

        def build(folder: Path, source: Source = source) -> dict[str, Any]:
            return _tokenise(source, tokenizer, folder, data, own, progress)

        told = [data.chat_date, data.chat_options] if source.config.messages is not None else None
        try:
            stores.append(entry(root, f"tokens-{key_of(FORMAT, fingerprint, digest, told)}", build))
        except RequestError as error:
            problems += error.problems
    if problems:
        raise RequestError(problems)
    return stores


def _tokenise(
    source: Source, tokenizer: PreTrainedTokenizerBase, folder: Path, data: DataConfig, own: bool, progress: Progress
) -> dict[str, Any]:
    """Write ids, supervised tokens and document offsets of both splits below `folder`; returns their facts.

    own: the tokenizer was trained on these data.
    """
    columns = column_keys(source.config)
    nulls = fills_up(source.config)
    encoder = Encoder(tokenizer, columns, source.key, data.chat_date, data.chat_options, nulls)
    plain = "text" in columns
    dtype = "uint16" if id_count(tokenizer) <= 1 << 16 else "uint32"
    arrays = {"ids": dtype, "offsets": "int64"} | ({} if plain else {"supervised": "bool", **PLACES})
    origins = source.origins()
    numbers = {origin: number for number, origin in enumerate(origins)}
    with writing(folder):
        writers = {(s, a): ArrayWriter(folder / f"{s}.{a}", kind) for s in SPLITS for a, kind in arrays.items()}
    problems, meter, read, reading = Problems(), Meter(source.size()), 0, Reading(tokenizer, own)
    try:
        for split in SPLITS:
            writers[split, "offsets"].append(np.zeros(1))
        for batch in _batches(source.read(problems, meter)):
            for held_out, split in enumerate(SPLITS):
                rows = [row for row in batch if row.held_out == bool(held_out)]
                found = encoder.encode(rows, problems, meter)
                encoded = [one for each in found for one in each]
                read += len(encoded)
                for row, each in zip(rows, found, strict=True):
                    _measure(reading, row, each, plain)
                with writing(folder):
                    _append(writers, split, encoded, plain)
                    if not plain:
                        places = [
                            row.where.rpartition(":") for row, each in zip(rows, found, strict=True) for _ in each
                        ]
                        writers[split, "origin"].append(np.array([numbers.get(name, -1) for name, _, _ in places]))
                        writers[split, "line"].append(np.array([int(line) for _, _, line in places], np.int64))
            progress(*source.read_so_far(meter, "tokenising"))
    finally:
        with writing(folder):
            for writer in writers.values():
                writer.close()
    problems.raise_any()
    count = read + meter.dropped
    changes = recorded(meter.changes.values(), origins, count)
    facts: dict[str, Any] = {"plain": plain, "dtype": dtype, "rows": count, "changes": changes}
    facts["unreadable"] = reading.recorded(origins)
    for split in SPLITS:
        documents = writers[split, "offsets"].count - 1
        if documents == 0:
            rule = (
                f"the {split.replace('_', '-')} split has no documents; at least two are needed, one of them held out"
            )
            nearest = "" if source.config.kind == "hub" else f"{source.key}.eval_path=FILE"
            raise RequestError(Problem(source.key, source.name, rule, nearest))
        facts[split] = {"documents": documents, "tokens": writers[split, "ids"].count}
    return facts


def _measure(reading: Reading, row: Row, documents: list[Encoded], plain: bool) -> None:
    """How much of a row can be read."""
    messages = row.content.get("messages")
    texts = [str(one.get("content", "")) for one in messages] if messages else list(row.content.values())
    reading.texts(row.where, texts)
    for ids, supervised in documents:
        reading.ids(row.where, ids, texts)
        if not plain:
            reading.ids(row.where, ids[supervised], reversed(texts), "tokens to be learned")


def _append(
    writers: dict[tuple[str, str], ArrayWriter], split: str, encoded: list[tuple[np.ndarray, np.ndarray]], plain: bool
) -> None:
    if not encoded:
        return
    lengths = np.array([len(ids) for ids, _ in encoded])
    writers[split, "offsets"].append(writers[split, "ids"].count + np.cumsum(lengths))
    writers[split, "ids"].append(np.concatenate([ids for ids, _ in encoded]))
    if not plain:
        writers[split, "supervised"].append(np.concatenate([supervised for _, supervised in encoded]))


def _batches(rows: Iterator[Row]) -> Iterator[list[Row]]:
    """Batches large enough to keep all cores busy, small enough to be held."""
    batch: list[Row] = []
    characters = 0
    for row in rows:
        batch.append(row)
        characters += sum(map(len, row.content.values()))
        if characters >= BATCH_CHARACTERS or len(batch) >= BATCH_ROWS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _packed(root: Path, store: Entry, split: str, data: DataConfig, progress: Progress) -> tuple[Tokens, Packing]:
    """Tokens of one split and how they are packed; the packing is cached too."""
    plain = store.facts["plain"]
    supervised = None if plain else store.array(f"{split}.supervised", "bool")
    tokens = Tokens(
        store.array(f"{split}.ids", store.facts["dtype"]), supervised, store.array(f"{split}.offsets", "int64")
    )
    arrays = {"start": "int64", "length": "int64", "follows": "bool", "rows": "int64", "supervised": "int64"}
    counts = [f"{first}{what}" for what in REASONS for first in ("", "first_")]

    def build(folder: Path) -> dict[str, Any]:
        progress(0, tokens.documents, "packing (documents)")
        packing = asdict(pack(tokens, data.seq_length, data.packing, cuttable=plain))
        with writing(folder):
            for name, dtype in arrays.items():
                with new_file(folder / name) as file:
                    file.write(packing[name].astype(dtype).data)
        progress(tokens.documents, tokens.documents, "packing (documents)")
        return {name: packing[name] for name in counts}

    name = key_of(FORMAT, store.folder.name, split, data.seq_length, data.packing)
    found = entry(root, f"packing-{name}", build)
    fields: dict[str, Any] = {name: found.array(name, dtype) for name, dtype in arrays.items()}
    return tokens, Packing(**fields, **found.facts)


def _require_sequences(sources: list[Source], packed: list[dict[str, tuple[Tokens, Packing]]]) -> None:
    rule = "no row of the {} split has a supervised token within data.seq_length"
    problems = [
        Problem(source.key, source.name, rule.format(split.replace("_", "-")), "a larger data.seq_length")
        for source, parts in zip(sources, packed, strict=True)
        for split in SPLITS
        if not parts[split][1].supervised.any()
    ]
    if problems:
        raise RequestError(problems)


def _changes(
    source: Source, store: Entry, parts: dict[str, tuple[Tokens, Packing]], data: DataConfig
) -> list[dict[str, Any]]:
    """What became of the rows of a source when they were read, and when they were packed; as of `changes.reported`."""
    found, rows, origins = list(store.facts["changes"]), store.facts["rows"], source.origins()
    lost = sum(change["count"] for change in found if change["effect"] == DROPPED)
    lost += sum(packing.unsupervised for _, packing in parts.values())
    lengths = Counter[int]()
    for tokens, packing in parts.values():
        if packing.truncated or packing.beyond:
            full = np.diff(tokens.offsets)
            lengths.update(full[full > data.seq_length].tolist())
    spare = max(0, int(min(0.05, data.max_dropped) * rows) - lost)
    for name, (effect, what) in REASONS.items():
        places = [
            [int(store.array(f"{split}.{array}", PLACES[array])[first]) for array in PLACES]
            for split, (_, packing) in parts.items() if (first := getattr(packing, f"first_{name}")) >= 0
        ]  # fmt: skip
        if places:
            origin, line = min(places)
            found.append(
                {
                    "what": what.format(data.seq_length), "effect": effect, "of": rows, "first": [origin, f":{line}"],
                    "count": sum(getattr(packing, name) for _, packing in parts.values()),
                    "seq_length": enough(lengths, spare) if name != "unsupervised" else None,
                }
            )  # fmt: skip
    return reported(found, source.name, origins)


def _source_report(source: Source, parts: dict[str, tuple[Tokens, Packing]], data: DataConfig) -> dict[str, Any]:
    report: dict[str, Any] = {"source": source.name, "weight": source.config.weight}
    for split in SPLITS:
        tokens, packing = parts[split]
        real = np.diff(np.concatenate([[0], np.cumsum(packing.length)])[packing.rows])
        rows, used = len(real), int(real.sum())
        report[split] = {
            "documents": tokens.documents,
            "tokens": used,
            "supervised": int(packing.supervised.sum()),
            "sequences": rows,
            "padding": 1 - used / int(widths(real, data.seq_length, data.packing).sum()),
            "truncated": packing.truncated,
            "without_supervision": packing.beyond + packing.unsupervised,
        }
    return report


def key_of(*parts: Any) -> str:
    """A name for everything an entry depends on."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]
