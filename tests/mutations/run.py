"""Break what this project promises, one promise at a time, and see that the suite notices: `make test-mutations`.

    python tests/mutations/run.py [NAME …] [jobs=2]

Each file of this folder is one deliberate break: what a user would suffer from it, the lines that it changes, and tests
of `make test` that must fail then. It is applied to a copy of the tree, never to the tree itself. Exit code 1 when a
break survives, or when its tests fail without it.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SHARED = ROOT.parent / "shared"
LIMIT_S = 600
"""A break may make a run hang: that is noticed, too."""


@dataclass(frozen=True)
class Mutation:
    """One break. suffers: what a user would. before → after: of `file`. tests: arguments of pytest, one must fail."""

    name: str
    suffers: str
    file: str
    before: str
    after: str
    tests: tuple[str, ...]

    def problem(self, root: Path) -> str:
        """Why it cannot be applied; empty when it can."""
        count = (root / self.file).read_text(encoding="utf-8").count(self.before)
        return "" if count == 1 else f"{self.file} has the lines {count} times"


def mutations() -> list[Mutation]:
    """All of them, by name."""
    found = []
    for path in sorted(HERE.glob("*.toml")):
        facts = tomllib.loads(path.read_text(encoding="utf-8"))
        facts["tests"] = tuple(facts["tests"])
        # A literal block begins behind the line break that opens it, and ends with the one before its end.
        facts |= {side: facts[side].removesuffix("\n") for side in ("before", "after")}
        found.append(Mutation(path.stem, **facts))
    return found


def copy_of_the_tree(folder: Path) -> Path:
    """The tree as it stands, without what git ignores, beside the shared data as here."""
    root = folder / "tree"
    listed = subprocess.run(
        ["git", "-C", ROOT, "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        capture_output=True, check=True,
    ).stdout  # fmt: skip
    for name in listed.decode().split("\0"):
        if name and (ROOT / name).is_file():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, root / name)
    if SHARED.is_dir():
        (folder / "shared").symlink_to(SHARED)
    return root


def passes(root: Path, tests: tuple[str, ...]) -> tuple[bool, str]:
    """(whether these tests pass in a tree, the end of what they said)."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    try:
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        return False, f"still running after {LIMIT_S} s"
    if done.returncode not in (0, 1):  # nothing collected, or a mistake in the mapping
        raise SystemExit(f"{' '.join(command)}\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    return done.returncode == 0, done.stdout[-2000:]


class Trees:
    """A copy of the tree for each thread."""

    def __init__(self, folder: Path):
        self._folder, self._local, self._count = folder, threading.local(), 0

    def mine(self) -> Path:
        if not hasattr(self._local, "root"):
            self._count += 1
            self._local.root = copy_of_the_tree(self._folder / str(self._count))
        return self._local.root


def tried(mutation: Mutation, trees: Trees) -> tuple[bool, float]:
    """(whether the suite notices, seconds)."""
    root, started = trees.mine(), time.monotonic()
    file = root / mutation.file
    whole = file.read_text(encoding="utf-8")
    file.write_text(whole.replace(mutation.before, mutation.after), encoding="utf-8")
    try:
        good, _ = passes(root, mutation.tests)
    finally:
        file.write_text(whole, encoding="utf-8")
    return not good, time.monotonic() - started


def main(argv: list[str]) -> int:
    jobs = next((int(word[5:]) for word in argv if word.startswith("jobs=")), 2)
    names = [word for word in argv if "=" not in word]
    wanted = [one for one in mutations() if not names or one.name in names]
    if unknown := set(names) - {one.name for one in wanted}:
        print(f"error: no such mutation: {', '.join(sorted(unknown))}", file=sys.stderr)
        return 2
    started = time.monotonic()
    survived = []
    with tempfile.TemporaryDirectory(prefix="mutations_") as folder, ThreadPoolExecutor(jobs) as pool:
        trees = Trees(Path(folder))
        stale = {one.name: problem for one in wanted if (problem := one.problem(ROOT))}
        for name, problem in stale.items():
            print(f"{name}: {problem}", file=sys.stderr)
        if stale:
            return 1
        tests = tuple(sorted({test for one in wanted for test in one.tests}))
        good, said = passes(trees.mine(), tests)
        if not good:
            print(f"without any break the tests fail:\n{said}", file=sys.stderr)
            return 1
        print(f"{len(tests)} tests pass without a break, {time.monotonic() - started:.0f} s", flush=True)
        for one, (noticed, seconds) in zip(wanted, pool.map(lambda one: tried(one, trees), wanted), strict=True):
            print(f"{'noticed ' if noticed else 'SURVIVED'} {seconds:4.0f} s  {one.name}: {one.suffers}", flush=True)
            survived += [] if noticed else [one.name]
    print(f"{len(wanted) - len(survived)} of {len(wanted)} noticed, {time.monotonic() - started:.0f} s")
    return bool(survived)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
