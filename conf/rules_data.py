"""Rules on data sources, and on sequences against the model's positions and vocabulary."""

from __future__ import annotations

import codecs
import dataclasses
import datetime
import glob
from collections.abc import Iterator
from encodings.aliases import aliases as encodings_of_python
from pathlib import Path

from conf.batch import Layout
from conf.environment import Environment
from conf.errors import Problem, did_you_mean
from conf.rules_values import changed, shown
from conf.schema import Config, DataConfig, SourceConfig

COLUMNS = ("text", "prompt", "completion", "messages")
FILES = ("path", "eval_path", "max_expansion")
TAKES: dict[str, tuple[str, ...]] = {
    "stdlib": (),
    "text": (*FILES, "encoding"),
    "jsonl": (*FILES, "encoding", *COLUMNS),
    "csv": (*FILES, "encoding", "delimiter", "header", "quoting", "text", "prompt", "completion"),
    "parquet": (*FILES, *COLUMNS),
    "hub": ("name", "subset", "split", "eval_split", "revision", *COLUMNS),
    **dict.fromkeys(("conll", "squad", "lines"), (*FILES, "encoding")),
    "idx": FILES,
    "images": ("path", "eval_path"),
    **dict.fromkeys(("digits", "line"), ()),
}
"""Kind of source → the keys that it reads."""
NEEDS = dict.fromkeys(("text", "jsonl", "csv", "parquet", "conll", "squad", "lines", "idx", "images"), "path")
NEEDS["hub"] = "name"
NOT_OF_TEXTS = ("idna", "punycode", "undefined", "unicode_escape", "unicode-escape", "raw_unicode_escape",
                "raw-unicode-escape", "utf-7")  # fmt: skip
"""Python's names for ways to write text inside of something else."""
POSITIONS = ("max_position_embeddings", "n_positions", "seq_length", "max_seq_len")
"""What transformers' configs call the number of positions."""


def sources(cfg: Config) -> list[tuple[str, SourceConfig]]:
    """(where it stands, source) of each source."""
    if cfg.data.mixture:
        return [(f"data.mixture[{index}]", source) for index, source in enumerate(cfg.data.mixture)]
    return [("data", cfg.data)]


def required(cfg: Config, layout: Layout, env: Environment) -> Iterator[Problem]:
    """A source of files has a path, a hub data set a name."""
    for where, source in sources(cfg):
        key = NEEDS.get(source.kind)
        if key and not getattr(source, key):
            example = "FILE, FOLDER or 'FOLDER/*'" if key == "path" else "NAME"
            yield Problem(f"{where}.{key}", "null", f"{source.kind} data needs a {key}", f"{where}.{key}={example}")


def taken(cfg: Config, layout: Layout, env: Environment) -> Iterator[Problem]:
    """Keys that a kind of source does not read are refused."""
    for where, source in sources(cfg):
        if source.kind not in TAKES:
            continue
        for field in dataclasses.fields(SourceConfig):
            name = field.name
            if name in ("kind", "weight", *TAKES[source.kind]) or not changed(source, name):
                continue
            readers = [kind for kind, keys in TAKES.items() if name in keys]
            near = f"data={readers[0]}" if where == "data" else f"kind: {readers[0]}"
            rule = f"{source.kind} data has no {name}; that is for {', '.join(readers)}"
            yield Problem(f"{where}.{name}", shown(getattr(source, name)), rule, near)


def mixture(cfg: Config, layout: Layout, env: Environment) -> Iterator[Problem]:
    """A mixture has at least two sources, and then no single source beside them."""
    data = cfg.data
    if not data.mixture:
        if data.kind == "mixture":
            example = "'[{kind: stdlib, weight: 1}, {kind: text, path: notes.txt, weight: 3}]'"
            yield Problem("data.mixture", "[]", "a mixture needs at least two sources", f"data.mixture={example}")
        if changed(data, "weight"):
            yield Problem("data.weight", shown(data.weight), "only sources of a mixture have weights", "data=mixture")
        return
    if len(data.mixture) == 1:
        kind = data.mixture[0].kind
        rule = "a mixture needs at least two sources"
        yield Problem("data.mixture", f"[{{kind: {kind}}}]", rule, f"data={kind}")
    for field in dataclasses.fields(SourceConfig):
        given = getattr(data, field.name)
        if field.name == "kind" and given in ("stdlib", "mixture"):
            continue
        if changed(data, field.name):
            rule = "beside data.mixture no single source is read; say it inside the source it belongs to"
            nearest = f"data.mixture=[{{{field.name}: {shown(given)}, …}}, …]"
            yield Problem(f"data.{field.name}", shown(given), rule, nearest)


def columns(cfg: Config, layout: Layout, env: Environment) -> Iterator[Problem]:
    """Rows are text, or prompt and completion, or messages."""
    for where, source in sources(cfg):
        given = [name for name in ("prompt", "completion") if getattr(source, name)]
        if len(given) == 1:
            other = "completion" if given == ["prompt"] else "prompt"
            yield Problem(f"{where}.{other}", "null", f"{given[0]} goes with {other}", f"{where}.{other}=COLUMN")
        if given and source.messages:
            rule = "rows are either chats or prompt and completion"
            yield Problem(f"{where}.messages", source.messages, rule, f"{where}.messages=null")
        if (given or source.messages) and changed(source, "text"):
            used = "messages" if source.messages else "prompt and completion"
            yield Problem(f"{where}.text", source.text, f"with {used} no text column is read", f"{where}.text=text")


def chats(cfg: Config, layout: Layout, env: Environment) -> Iterator[Problem]:
    """The date that chat templates are told is one, and what they are told goes with chats."""
    try:
        datetime.date.fromisoformat(cfg.data.chat_date)
    except ValueError:
        near = f"data.chat_date={DataConfig.chat_date}"
        yield Problem("data.chat_date", cfg.data.chat_date, "a date, YYYY-MM-DD", near)
    given = [
        name for name in ("chat_date", "chat_options") if getattr(cfg.data, name) not in ({}, DataConfig.chat_date)
    ]
    for name in given:
        if not any(source.messages for _, source in sources(cfg)):
            rule = "this is for chat templates, and no source has chats"
            yield Problem(f"data.{name}", shown(getattr(cfg.data, name)), rule, "data.messages=COLUMN")


def held_out(cfg: Config, layout: Layout, env: Environment) -> Iterator[Problem]:
    """A share is set aside only where no held-out data is named; files are counted only where there are files."""
    found = sources(cfg)
    if changed(cfg.data, "held_out") and all(source.eval_path or source.eval_split for _, source in found):
        rule = "the held-out data is named (eval_path, eval_split), so none is set aside"
        yield Problem("data.held_out", shown(cfg.data.held_out), rule, "data.held_out=0.02")
    if cfg.data.max_files is not None and not any(source.kind in ("stdlib", "text") for _, source in found):
        rule = "files are counted for stdlib and text only"
        yield Problem("data.max_files", str(cfg.data.max_files), rule, "data.max_files=null")


def paths(cfg: Config, layout: Layout, env: Environment) -> Iterator[Problem]:
    """Files, folders and globs of data name something that exists."""
    for where, source in sources(cfg):
        for key in ("path", "eval_path"):
            value = getattr(source, key)
            if not value or source.kind not in TAKES or key not in TAKES[source.kind]:
                continue
            path = Path(value).expanduser()
            if path.exists():
                continue
            if glob.has_magic(value):
                if next(glob.iglob(str(path), recursive=True), None) is None:
                    rule = "no file matches this pattern"
                    yield Problem(f"{where}.{key}", value, rule, f"{where}.{key}='FOLDER/**/*' (quoted)")
            else:
                rule = "there is no such file or folder"
                yield Problem(f"{where}.{key}", value, rule, f"{where}.{key}={nearest_path(path)}")


def nearest_path(path: Path) -> Path:
    """The existing path most like `path`: a sibling of similar name, else the folder that does exist."""
    parent = next((folder for folder in path.parents if folder.is_dir()), Path("."))
    part = path.relative_to(parent).parts[0]
    stems = {entry.stem: entry.name for entry in sorted(parent.iterdir())}  # two names are not alike by their `.csv`
    near = did_you_mean(Path(part).stem, stems)
    return parent / stems[near] if near else parent


def positions(cfg: Config, layout: Layout, env: Environment) -> Iterator[Problem]:
    """A sequence fits into the positions of the model (a pretrained model's are checked with its own config)."""
    for name in POSITIONS:
        limit = cfg.model.config.get(name)
        if isinstance(limit, int) and cfg.data.seq_length > limit:
            rule = f"the model has {limit} positions (model.config.{name})"
            yield Problem("data.seq_length", str(cfg.data.seq_length), rule, f"data.seq_length={limit}")
            return


def vocabulary(cfg: Config, layout: Layout, env: Environment) -> Iterator[Problem]:
    """Every token has an embedding, and the size of a tokenizer is said only where one is trained."""
    size, rows = cfg.data.vocab_size, cfg.model.config.get("vocab_size")
    if size is None:
        return
    if cfg.model.path or cfg.model.tokenizer:
        owner = "the model" if cfg.model.path else "model.tokenizer"
        rule = f"{owner} brings its tokenizer, none is trained on the data"
        yield Problem("data.vocab_size", str(size), rule, "data.vocab_size=null")
    elif isinstance(rows, int) and size > rows:
        rule = f"the embedding has {rows} rows (model.config.vocab_size)"
        yield Problem("data.vocab_size", str(size), rule, f"data.vocab_size={rows}, or model.config.vocab_size={size}")


def encodings(cfg: Config, layout: Layout, env: Environment) -> Iterator[Problem]:
    """An encoding is one of Python's, of texts."""
    for where, source in sources(cfg):
        if not is_encoding(source.encoding):
            names = [name.replace("_", "-") for name in encodings_of_python.values() if is_encoding(name)]
            near = did_you_mean(source.encoding.lower().replace("_", "-"), names) or "utf-8"
            rule = "no encoding of texts that Python knows"
            yield Problem(f"{where}.encoding", source.encoding, rule, f"{where}.encoding={near}")


def is_encoding(name: str) -> bool:
    """Whether Python decodes texts of this encoding piece by piece, and what comes out is text."""
    try:
        found = codecs.lookup(name)
    except (LookupError, ValueError):  # ValueError: a name with a null character
        return False
    return found._is_text_encoding and found.incrementaldecoder is not None and found.name not in NOT_OF_TEXTS


RULES = (encodings, required, taken, mixture, columns, chats, held_out, paths, positions, vocabulary)
