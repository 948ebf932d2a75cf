"""gpu.md: what was measured, a table for each step, from the rows alone."""

from __future__ import annotations

from statistics import median
from typing import Any

from benchmarks.gpu_steps.journal import Row, Start
from benchmarks.report import table

GIB = 2**30


def report(starts: list[Start]) -> list[str]:
    """Lines of Markdown, the newest facts first; rows of another commit or device are never in one table."""
    lines: list[str] = []
    for start in reversed(starts):
        if not start.parts and not start.closed:
            continue
        lines += [*_heading(start.facts), ""]
        for title, head, rows in (
            ("a: ceilings", ["", "figure"], _ceilings(start)),
            (
                "b: gradients against plain PyTorch",
                ["", "largest relative error", "bound", "of plain PyTorch", "loss", "parameter"],
                _gradients(start),
            ),
            (
                "c: three loops",
                ["", "tokens/s", "least – most", "to by hand", "MFU", "step, ms", "peak GiB", "first step, s",
                 "held-out loss"],
                _contest(start),
            ),
            (
                "d: one thing changed",
                ["", "tokens/s", "least – most", "ratio", "to", "peak GiB", "first step, s", "held-out loss"],
                _changes(start),
            ),
            (
                "e: predicted and measured",
                ["", "predicted GiB", "measured GiB", "ratio", "predicted step, ms", "measured step, ms"],
                _plans(start),
            ),
            ("f: offload, save, load", ["", "figures"], _plain(start, "f")),
            ("g: whole commands", ["", "figures"], _plain(start, "g")),
            ("h: SIGKILL and resume", ["", "figures"], _plain(start, "h")),
            ("Not ended", ["", "why"], _failures(start)),
        ):  # fmt: skip
            if rows:
                lines += [f"### {title}", "", *table(head, rows), ""]
    return lines or ["nothing was measured"]


def _heading(facts: Row) -> list[str]:
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    machine = facts["device"] if facts["kind"] == "cpu" else f"{facts['device']}, {facts['processor']}"
    return [
        f"`{facts['command']}`",
        f"({machine}; {versions}; size {facts['size']}; commit {facts['commit']}, files {facts['files']}, "
        f"{facts['date']})",
    ]


def _note(row: Row) -> str:
    """A cell's words, which must not end the cell."""
    return str(row.get("note", "")).replace("|", "/").replace("\n", " ")


def _gib(size: Any) -> str:
    return "" if size is None else f"{size / GIB:.2f}"


def _ceilings(start: Start) -> list[list[str]]:
    rows = []
    for row in start.of("a"):
        if "tflop_per_s" in row:
            rows.append([f"{row['part']}, {row['size']}²", f"{row['tflop_per_s']:,.1f} TFLOP/s"])
        elif "gb_per_s" in row:
            rows.append([f"{row['part']}, {row['bytes'] / GIB:.3g} GiB", f"{row['gb_per_s']:,.1f} GB/s"])
        elif "total_bytes" in row:
            shown = f"{row['device']}, {_gib(row['total_bytes'])} GiB, {row['multiprocessors']} multiprocessors, "
            rows.append([row["part"], f"{shown}sm {row['capability']}, CUDA {row['cuda']}, nccl {row['nccl']}"])
        elif "note" in row:
            rows.append([row["part"], _note(row)])
    return rows


def _gradients(start: Start) -> list[list[str]]:
    rows = []
    for row in start.of("b"):
        name = f"{row['precision']}, {row['part']}"
        if "note" in row:
            rows.append([name, _note(row), "", "", "", ""])
            continue
        plain = f"{row['plain_relative_error']:.1e}" if row["plain_relative_error"] else ""
        error = f"{row['largest_relative_error']:.1e}" + ("" if row["within"] else " (beyond)")
        rows.append(
            [name, error, f"{row['bound']:.1e}", plain, f"{row['loss_relative_error']:.1e}", f"`{row['parameter']}`"]
        )
    return rows


def _grouped(rows: list[Row], *keys: str) -> dict[tuple[Any, ...], list[Row]]:
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row.get(key) for key in keys), []).append(row)
    return groups


def _speed(rows: list[Row]) -> list[float]:
    """tokens/s of all blocks."""
    return [speed for row in rows for speed in row.get("blocks_tokens_per_s", [])]


def _losses(rows: list[Row]) -> str:
    found = sorted({f"{row['held_out_loss']:.4f}" for row in rows if "held_out_loss" in row})
    return ", ".join(found)


def _contest(start: Start) -> list[list[str]]:
    groups = _grouped(start.of("c"), "length", "loop")
    rows = []
    for (length, loop), found in groups.items():
        speeds, timed = _speed(found), [row for row in found if "measured_step_s" in row]
        if not timed:
            continue
        base = _speed(groups.get((length, "by_hand"), []))
        mfus = [row["mfu"] for row in timed if row.get("mfu") is not None]
        rows.append([
            f"{length}, {loop}", f"{median(speeds):,.0f}", f"{min(speeds):,.0f} – {max(speeds):,.0f}",
            f"{median(speeds) / median(base):.3f}" if base else "", f"{median(mfus):.1%}" if mfus else "",
            f"{1e3 * median(row['measured_step_s'] for row in timed):,.1f}",
            _gib(max(row["measured_bytes"] for row in timed)), f"{max(row['first_step_s'] for row in timed):.1f}",
            _losses(found),
        ])  # fmt: skip
    return rows


def _changes(start: Start) -> list[list[str]]:
    contest, groups = start.of("c"), _grouped(start.of("d"), "change")
    rows = []
    for (change,), found in groups.items():
        speeds = _speed(found)
        note = next((_note(row) for row in found if "note" in row), "")
        if not speeds:
            rows.append([change, note, "", "", "", "", "", ""])
            continue
        timed = next(row for row in found if "measured_step_s" in row)
        packed = change.startswith("packed_")
        base = _speed(groups.get(("packed_sdpa",), [])) if packed else _speed(
            [row for row in contest if row["length"] == timed["tokens_per_step"] // 8 and row["loop"] == "ours"]
        )  # fmt: skip
        rows.append([
            change + (f" ({note})" if note else ""), f"{median(speeds):,.0f}",
            f"{min(speeds):,.0f} – {max(speeds):,.0f}", f"{median(speeds) / median(base):.3f}" if base else "",
            "packed_sdpa" if packed else "c, ours", _gib(timed["measured_bytes"]), f"{timed['first_step_s']:.1f}",
            _losses(found),
        ])  # fmt: skip
    return rows


def _plans(start: Start) -> list[list[str]]:
    """Of every row with a prediction, whatever step it is of."""
    rows = []
    for found in start.parts.values():
        for row in found:
            if row["step"] == "e" and "note" in row:
                rows.append([row["part"], _note(row), "", "", "", ""])
            elif row.get("predicted_bytes") and row.get("measured_bytes"):
                name = row["part"] if row["step"] == "e" else f"{row['step']}: {row['name']}"
                rows.append([
                    name, _gib(row["predicted_bytes"]), _gib(row["measured_bytes"]),
                    f"{row['predicted_bytes'] / row['measured_bytes']:.3f}",
                    f"{1e3 * row['predicted_step_s']:,.1f}", f"{1e3 * row['measured_step_s']:,.1f}",
                ])  # fmt: skip
    return rows


def _plain(start: Start, step: str) -> list[list[str]]:
    """The figures as they are: bytes as GiB, seconds to the hundredth."""
    left_out = {"step", "name", "part", "request", "command", "note", "predicted_step_s", "flops_per_step"}
    rows = []
    for row in start.of(step):
        cells = [_note(row)] if "note" in row else []
        for name, value in row.items():
            if name in left_out or value is None:
                continue
            if name.endswith("bytes") or "_bytes_" in name:
                cells.append(f"{name.replace('_bytes', '').replace('bytes', 'size')} {_gib(value)} GiB")
            elif isinstance(value, dict):
                cells += [f"{name} {key} {_number(number)}" for key, number in value.items()]
            else:
                cells.append(f"{name.replace('_', ' ')} {_number(value)}")
        rows.append([row["part"], ", ".join(cells)])
    return rows


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if type(value) is int else str(value)


def _failures(start: Start) -> list[list[str]]:
    rows = []
    for key, row in start.closed.items():
        if not row.get("ok"):
            rows.append([key, last_words(str(row.get("error", ""))).replace("|", "/")])
    return rows


def last_words(error: str) -> str:
    """The line of an error's text that says what it is."""
    lines = [line for line in error.splitlines() if line.strip()]
    return next((line for line in reversed(lines) if not line.startswith(" ")), "")[:300]
