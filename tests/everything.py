"""All that is ever proven, in one go: `make test-all` (a night on two cores); writes docs/proof.md.

    python tests/everything.py [only=suite,matrix] [data=FOLDER] [again=true]

Parts that have passed at this commit are not run again, so what was stopped goes on where it was. Their output lies in
runs/everything. Exit code 1 when a part fails.
"""

# ruff: noqa: E402 - started as a script, it first puts the repository root on sys.path
from __future__ import annotations

import datetime
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

from benchmarks.report import run, setting
from conf.errors import Problem, RequestError
from launch.runtime.request import split_arguments

OWN = {"only": "", "data": "../shared/data", "again": "false"}
WRITTEN = ("docs", "recipes/models/families.json", "benchmarks/README.md")
"""What parts write themselves, or what is written from their figures: a change of it is no other tree."""
PAGE = ROOT / "docs" / "proof.md"


def counted(said: str) -> str:
    """pytest's last line."""
    return next(
        (line.strip("= ") for line in reversed(said.splitlines()) if " passed" in line or " failed" in line), ""
    )


def worst_of_matrix(said: str) -> str:
    """How many cases, and the largest error of each column."""
    cases = re.search(r"^(\d+) combinations", said, re.MULTILINE)
    rows = [line.strip("| ").split(" | ") for line in said.splitlines() if " × " in line and line.startswith("| ")]
    columns = ("loss", "norm", "gradient", "held-out loss")
    worst = [max((float(row[2 + n]) for row in rows[1:]), default=float("nan")) for n in range(len(columns))]
    figures = ", ".join(f"{name} {value:.1e}" for name, value in zip(columns, worst, strict=True))
    return f"{cases.group(1) if cases else 'no'} cases; largest relative errors: {figures}"


def found(pattern: str) -> Callable[[str], str]:
    """The last line that matches."""
    return lambda said: next((line.strip() for line in reversed(said.splitlines()) if re.search(pattern, line)), "")


@dataclass(frozen=True)
class Part:
    """command: `{python}`, `{data}`, `{state}`: this interpreter, the folder of data sets, that of outputs.

    tell: output → finding.
    """

    name: str
    command: str
    tell: Callable[[str], str]
    thorough: bool = False


def suite(folder: str, name: str = "") -> Part:
    words = f"{{python}} -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder {folder}"
    return Part(f"suite: {name or folder}", words, counted, thorough=True)


ROOMS = ("conf", "recipes", "launch", "distributed", "faults", "golden", "notebooks")


PARTS = (
    *(suite(f"tests/{room}") for room in ROOMS),
    suite(" ".join(["tests", *(f"--ignore=tests/{room}" for room in ROOMS)]), "the rest"),
    Part("mutations", "{python} tests/mutations/run.py", found(r"\d+ of \d+ noticed")),
    Part("families", "{python} tests/distributed/families.py", found(r"families: .*pipeline|families; ")),
    Part("matrix", "{python} tests/distributed/matrix_report.py every=1 state={state}/matrix.jsonl", worst_of_matrix),
    Part("deaths at random", "{python} tests/faults/trials.py trials=200", found(r"deaths, \d+ runs")),
    Part("GPU check, rehearsed", "{python} benchmarks/gpu.py out={state}/gpu device=cpu size=tiny minutes=15",
         found(r"not reached|all was reached")),
)  # fmt: skip


def parts() -> tuple[Part, ...]:
    """All of them; the tasks are benchmarks/tasks.py's."""
    from benchmarks.tasks import TASKS

    tasks = (Part(f"task: {task.recipe}", f"{{python}} benchmarks/tasks.py {{data}} only={task.recipe}",
                  found(rf"^\| {task.recipe} ")) for task in TASKS)  # fmt: skip
    return (*PARTS, *tasks)


def state_folder() -> Path:
    """Where outputs of this very tree lie: by commit and by what differs from it."""

    def git(*words: str) -> bytes:
        return subprocess.run(["git", "-C", ROOT, *words], capture_output=True, check=True).stdout

    changes = git("diff", "HEAD", "--", ".", *(f":!{name}" for name in WRITTEN))
    name = git("rev-parse", "--short", "HEAD").decode().strip()
    return ROOT / "runs" / "everything" / (f"{name}-{hashlib.sha256(changes).hexdigest()[:8]}" if changes else name)


def attempt(part: Part, state: Path, data: str) -> dict:
    """Run one part; its output goes to a file. Ended with this process."""
    stem = re.sub(r"\W+", "_", part.name)
    words = [word.format(python=sys.executable, data=data, state=state) for word in part.command.split()]
    environment = os.environ | ({"TESTS_THOROUGH": "1"} if part.thorough else {})
    started = time.monotonic()
    with (state / f"{stem}.log").open("w") as log:
        process = subprocess.Popen(words, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            code = process.wait()
        except BaseException:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait()
            raise
    said = (state / f"{stem}.log").read_text(errors="replace")
    return {"name": part.name, "command": part.command, "code": code, "finding": part.tell(said),
            "seconds": round(time.monotonic() - started), "date": str(datetime.date.today())}  # fmt: skip


def page(results: list[dict]) -> str:
    """Markdown."""
    lines = [
        "# What was proven, and when",
        "",
        "Printed by `make test-all`, which goes on where it was stopped.",
        "",
        f"{setting()}",
        "",
        "| part | result | what it found | minutes | date |",
        "| --- | --- | --- | ---: | --- |",
    ]
    for result in results:
        outcome = "passed" if result["code"] == 0 else f"FAILED ({result['code']})"
        finding = result["finding"].replace("|", "·").strip(" ·")
        lines.append(f"| {result['name']} | {outcome} | {finding} | {result['seconds'] / 60:.1f} | {result['date']} |")
    return "\n".join([*lines, ""])


def main(argv: list[str]) -> int:
    extra, own = split_arguments(argv, OWN)
    known = {part.name.partition(":")[0] for part in parts()}
    wanted = set(own["only"].split(",")) if own["only"] else known
    if extra or wanted - known:
        value = " ".join(extra) or ",".join(sorted(wanted - known))
        raise RequestError(Problem("only", value, f"one of {', '.join(sorted(known))}", "python tests/everything.py"))
    data, state = str(Path(own["data"]).resolve()), state_folder()
    state.mkdir(parents=True, exist_ok=True)
    chosen = [part for part in parts() if part.name.partition(":")[0] in wanted]
    print(f"outputs in {state}; what has passed there is not run again")
    for number, part in enumerate(chosen, 1):
        file = state / (re.sub(r"\W+", "_", part.name) + ".json")
        if file.exists() and own["again"] != "true" and json.loads(file.read_text())["code"] == 0:
            continue
        print(f"{number} of {len(chosen)}: {part.name} …", end=" ", flush=True)
        try:
            result = attempt(part, state, data)
        except KeyboardInterrupt:
            print("\nstopped; the same command goes on with this part")
            return 130
        file.write_text(json.dumps(result))
        print(
            f"{'passed' if result['code'] == 0 else 'FAILED'}, {result['seconds']} s: {result['finding']}", flush=True
        )
        write(state)
    return int(any(result["code"] for result in write(state)))


def write(state: Path) -> list[dict]:
    """The page, of all parts that have run at this commit. Returns what it shows."""
    order = {part.name: number for number, part in enumerate(parts())}
    results = [json.loads(file.read_text()) for file in state.glob("*.json")]
    results = sorted((one for one in results if one["name"] in order), key=lambda one: order[one["name"]])
    PAGE.write_text(page(results))
    return results


if __name__ == "__main__":
    run(main)
