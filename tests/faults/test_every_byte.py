"""Each byte of what is kept is flipped once, or one in each block of large files: never accepted without a word."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from commands import ROOT
from support.tiers import THOROUGH

from conf.errors import RequestError
from launch.runtime import checkpoint
from recipes.checksums import SUMS, check_sums, write_sums
from recipes.data.store import ArrayWriter, entry

GOLDEN = ROOT / "tests/golden/0.1.0"
SMALL, BLOCK = 4096, 4096
EVERY = 1 if THOROUGH else 13
"""`make test` flips each thirteenth byte of small files, and one bit of each."""
BITS = range(8) if THOROUGH else (0,)


def flips(file: Path) -> Iterator[str]:
    """Flip a bit, say where, and put it back."""
    whole = file.read_bytes()
    step = EVERY if len(whole) <= 16 * SMALL else BLOCK
    for at in range(0, len(whole), step):
        for bit in BITS:
            changed = bytearray(whole)
            changed[at] ^= 1 << bit
            file.write_bytes(changed)
            yield f"bit {bit} of byte {at} of {file.name}"
    file.write_bytes(whole)


def never_accepted(folder: Path, accepted: Callable[[], bool]) -> None:
    assert accepted()
    tried = 0
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        for where in flips(file):
            tried += 1
            assert not accepted(), where
    assert accepted() and tried > 20


@pytest.mark.parametrize("name", ["language_model", "classes"])
def test_of_a_checkpoint(name: str, tmp_path: Path) -> None:
    source = checkpoint.newest(GOLDEN / name)
    assert source is not None
    folder = tmp_path / source.folder.name
    shutil.copytree(source.folder, folder)

    def accepted() -> bool:
        try:
            return not checkpoint.read(folder).damage()
        except RequestError:
            return False

    never_accepted(folder, accepted)


def test_of_the_cache_of_rows(tmp_path: Path) -> None:
    """An entry that is not what was written is built again."""
    built = 0

    def build(folder: Path) -> dict[str, object]:
        nonlocal built
        built += 1
        writer = ArrayWriter(folder / "ids", "int32")
        writer.append(np.arange(300))
        writer.close()
        return {"rows": 300, "what": "é"}

    first = entry(tmp_path, "rows", build)
    good = {path.name: path.read_bytes() for path in first.folder.iterdir()}

    def accepted() -> bool:
        before = built
        found = entry(tmp_path, "rows", build)
        assert found.facts == first.facts and found.array("ids", "int32").tolist() == list(range(300))
        return built == before

    for name in good:
        for where in flips(first.folder / name):
            assert not accepted(), where
    assert accepted()


def test_of_an_exported_model(tmp_path: Path) -> None:
    for name, content in (("config.json", b'{"a": 1}'), ("model.safetensors", b"\x02\0\0\0\0\0\0\0{}" * 40)):
        (tmp_path / name).write_bytes(content)
    write_sums(tmp_path)
    assert SUMS in {path.name for path in tmp_path.iterdir()}

    def accepted() -> bool:
        try:
            check_sums(tmp_path)
        except RequestError:
            return False
        return True

    never_accepted(tmp_path, accepted)
