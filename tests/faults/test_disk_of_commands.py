"""A disk that fails at each operation of what writes beside a run: the cache, exports, curves, old checkpoints.

What fails says so, and succeeds when it is tried again; what is there then is what an unbroken one leaves.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import ROOT
from disk import server
from support.server import Line
from support.tiers import THOROUGH
from transformers import LlamaConfig, LlamaForCausalLM

from launch.runtime.checkpoint import MANIFEST
from recipes.checksums import SEAL, seal

pytestmark = pytest.mark.slow
CODES = (errno.ENOSPC, errno.EIO, 0)
"""0: a short write, and no room behind it."""
EVERY = 1 if THOROUGH else 11


def cache(folder: Path) -> None:
    from conf.compose import compose
    from conf.environment import Environment
    from recipes import recipe_class

    rows = folder.parent / "rows.csv"
    rows.write_text("text,label\n" + "".join(f"a row of words {n},{n % 2}\n" for n in range(60)))
    words = ["+recipe=classify_packages", f"data.path={rows}", "data.label=label", "data.text=text", "data.kind=csv"]
    cfg = compose([*words, f"data.cache_dir={folder / 'cache'}", "run_dir=never"], 1, Environment())
    recipe_class(cfg.task)(cfg).prepare()


def export(folder: Path) -> None:
    import torch

    from launch.runtime.export import convert

    if not (folder / "out").exists():
        convert(folder.parent / "model", folder / "out", torch.bfloat16, 2**16)


def curve(folder: Path) -> None:
    from launch.runtime.plots import plot_loss

    if not (folder / "metrics.jsonl").exists():
        return
    plot_loss(folder)


def keep(folder: Path) -> None:
    from launch.checkpoints import main

    if main([str(folder), "keep=1"]):
        raise OSError(errno.EIO, "one is said to be damaged")


def sweep(line: Line, action: Callable[[Path], None], source: Path, folder: Path) -> None:
    """Send (operations, how many of the trials were refused, what is wrong), of a process that this disk is below."""
    from conf.errors import RequestError

    os.environ["COLUMNS"] = "200"
    library, target = ctypes.CDLL(None), folder / "target"
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)

    def begin() -> None:
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(source, target)

    def arm(first: int, count: int, code: int) -> None:
        library.arm(
            str(target).encode(), ctypes.c_long(first), ctypes.c_long(first + count - 1), code, -1, -1, int(first > 0)
        )

    begin()
    action(target)  # what is loaded once
    begin()
    library.arm(str(target).encode(), ctypes.c_long(0), ctypes.c_long(-1), 0, -1, -1, 1)
    action(target)
    count, expected = int(library.operations()), digests(target)
    wrong, refused = [], 0
    for number in range(1, count + 1, EVERY):
        code = CODES[number // EVERY % len(CODES)]
        begin()
        arm(number, 2 if code == 0 else 1, code)
        try:
            action(target)
        except (RequestError, OSError):
            refused += 1
        except BaseException as error:
            wrong.append(f"operation {number}, {code}: {type(error).__name__}: {error}")
        library.arm(b"", ctypes.c_long(0), ctypes.c_long(-1), 0, -1, -1, 0)
        action(target)
        if (there := digests(target)) != expected:
            differ = [name for name in {**there, **expected} if there.get(name) != expected.get(name)]
            wrong.append(f"operation {number}, {code}: other {', '.join(differ)}")
    line.send((count, refused, wrong))


def digests(folder: Path) -> dict[str, str]:
    """Of what is there, by its path; locks aside."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock" and path.name != ".lock"]
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize("action", [cache, export, curve, keep], ids=lambda action: action.__name__)
def test_each_operation(action: Callable[[Path], None], tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    if action is keep:
        golden = ROOT / "tests/golden/0.1.0/language_model/step_00000003"
        for step in (1, 2, 3):
            folder = source / f"checkpoints/step_{step:08d}"
            shutil.copytree(golden, folder)
            manifest = json.loads((folder / MANIFEST).read_text()) | {"step": step}
            del manifest[SEAL]
            (folder / MANIFEST).write_text(json.dumps(seal(manifest)))
    if action is curve:
        rows = [f'{{"step": {step}, "loss": {5 - step / 10}}}\n' for step in range(1, 9)]
        (source / "metrics.jsonl").write_text("".join(rows))
    if action is export:
        tiny = LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
        )
        LlamaForCausalLM(tiny).save_pretrained(tmp_path / "model")
    child = server().start(sweep, action, source, tmp_path)
    count, refused, wrong = child.receive()
    assert child.wait() == 0
    print(f"{action.__name__}: {count} operations, {refused} refusals")
    assert not wrong, "\n".join(wrong)
    assert count > 10 and refused
