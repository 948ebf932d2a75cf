"""The whole parity matrix; writes docs/matrix.md: `make test-matrix` (about an hour on two cores).

    python tests/distributed/matrix_report.py every=8          # every eighth case only
    python tests/distributed/matrix_report.py state=FILE.jsonl  # what the file has is not run again

Exit code 1 when a gradient, norm or loss of any case is off by more than 1e-5.
"""

# ruff: noqa: E402 - started as a script, it first puts the suite on sys.path
from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests/distributed")]

import conftest  # noqa: F401 - the suite's settings: CPU, one thread
from layouts import Case, errors, matrix, train
from ranks import run_ranks

from benchmarks.report import setting

RELATIVE = 1e-5
AT_ONCE = 24
"""Cases that the same ranks go through before new ones are made."""
STEPS = 5


def chunks(cases: list[Case]) -> Iterator[list[Case]]:
    """Cases of one world size, some at a time."""
    worlds = defaultdict(list)
    for case in cases:
        worlds[case.world].append(case)
    for _, group in sorted(worlds.items()):
        for first in range(0, len(group), AT_ONCE):
            yield group[first : first + AT_ONCE]


def known(state: Path | None) -> dict[str, dict[str, float]]:
    """Case → errors, of a run that was stopped."""
    if state is None or not state.exists():
        return {}
    return {name: found for line in state.read_text().splitlines() for name, found in json.loads(line).items()}


def main(every: int, state: Path | None = None) -> int:
    cases = matrix()[::every]
    done, bad, before = 0, [], known(state)
    rows: dict[tuple, list] = defaultdict(lambda: [0, {}])
    for group in chunks(cases):
        if missing := [case for case in group if str(case) not in before]:
            ranks = run_ranks(group[0].world, train, missing, STEPS, timeout_s=1200)
            new = {str(case): errors(case, [rank[number] for rank in ranks], STEPS)
                   for number, case in enumerate(missing)}  # fmt: skip
            before |= new
            if state is not None:
                with state.open("a") as file:
                    file.write(json.dumps(new) + "\n")
        for case in group:
            found = before[str(case)]
            entry = rows[(case.data, case.tensor, case.pipeline, case.sequence)]
            entry[0] += 1
            entry[1] = {key: max(value, entry[1].get(key, 0.0)) for key, value in found.items()}
            if max(found.values()) >= RELATIVE:
                bad.append((case, found))
        done += len(group)
        print(f"{done} of {len(cases)}, {len(bad)} off", file=sys.stderr, flush=True)
    text = document(rows, len(cases), every)
    print(text)
    for case, found in bad:
        print(f"off: {case} {found}")
    (ROOT / "docs" / "matrix.md").write_text(text)
    return bool(bad)


def document(rows: dict, count: int, every: int) -> str:
    which = "" if every == 1 else f" (one in {every} of them: `every={every}`)"
    lines = [
        "# The parity matrix",
        "",
        f"{count} combinations{which}: five models (Llama with grouped heads, a tied one with 9 heads over 3, GPT-2,",
        "Qwen3, Mixtral) × ZeRO 0-3 × the layouts below × accumulation 1 and 4 × checkpointing × packing, all that the",
        "rules let pass on at most 8 ranks. Each trains five steps in fp32 (SGD with momentum, clipped); losses, norms",
        "and every parameter's gradient before clipping are compared with plain PyTorch in one process.",
        "",
        f"Printed by `python tests/distributed/matrix_report.py every={every}` on {setting()}.",
        "",
        "| data × tensor × pipeline × sequence | cases | loss | norm | gradient of one parameter | held-out loss |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for layout, (number, worst) in sorted(rows.items()):
        cells = [" × ".join(map(str, layout)), str(number)]
        cells += [f"{worst[key]:.1e}" for key in ("loss", "norm", "gradient", "held_out")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    own = {"every": "1", "state": ""} | dict(word.split("=", 1) for word in sys.argv[1:])
    raise SystemExit(main(int(own["every"]), Path(own["state"]) if own["state"] else None))
