"""No file ends a reader in anything but a refusal with its name, soon, and within bounds of memory."""

from __future__ import annotations

import resource
import time
import traceback
from pathlib import Path

import hostile
import pytest

from conf.compose import compose
from conf.errors import RequestError
from recipes import recipe_class
from recipes.data.tokenizer import load_tokenizer

SECONDS, BYTES = 5.0, 1 << 30
REQUESTS: dict[str, tuple[str, ...]] = {
    "jsonl": ("+recipe=quickstart", "data=jsonl"),
    "csv": ("+recipe=classify_packages", "data=csv", "data.label=label"),
    "parquet": ("+recipe=quickstart", "data=parquet"),
    "conll": ("+recipe=tag_python", "data=conll"),
    "squad": ("+recipe=answer_defaults", "data=squad"),
    "lines": ("+recipe=describe_functions", "data=lines"),
    "idx": ("+recipe=digits", "data=idx"),
    "images": ("+recipe=digits", "data=images"),
}
CORPUS = list(hostile.corpus())
READ = {("lines", "a page of the web"), ("lines", "a pointer of Git LFS")}
"""Lines of text are lines of text."""


@pytest.mark.parametrize("case", CORPUS, ids=[f"{kind}: {name}" for kind, name, _ in CORPUS])
def test_it_is_refused(case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, name, content = case
    folder = tmp_path / "data" / "class"
    folder.mkdir(parents=True)
    file = folder / f"file{hostile.SUFFIXES[kind]}"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        content(file)
    path = folder.parent if kind == "images" else file
    other = ("data.target_path=" + str(file),) if kind in ("lines", "idx") else ()
    words = [*REQUESTS[kind], f"data.path={path}", *other, f"data.cache_dir={tmp_path / 'cache'}", "data.held_out=0.5"]
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    says = ""
    try:
        cfg = compose(words, 1)
        recipe = recipe_class(cfg.task)(cfg)
        if problems := recipe.check():
            raise RequestError(problems)
        recipe.prepare()
    except RequestError as error:
        says = str(error)
    except BaseException:
        pytest.fail(traceback.format_exc(limit=-6))
    assert says or (kind, name) in READ, "it was read"
    assert not says or str(folder.parent) in says or "data" in says
    assert time.monotonic() - started < SECONDS
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < BYTES


@pytest.mark.parametrize("name", hostile.TOKENIZERS)
def test_no_tokenizer_is_made_of_it(name: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(hostile.TOKENIZERS[name])
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    started = time.monotonic()
    with pytest.raises(RequestError, match="tokenizer"):
        load_tokenizer(str(tmp_path))
    assert time.monotonic() - started < SECONDS and not Path("hacked").exists()


def test_there_are_enough_of_them() -> None:
    assert len(CORPUS) >= 60
