"""A plan as a person reads it."""

from __future__ import annotations

import json
from typing import Any

from rich.console import Console
from rich.table import Table

from conf.batch import Layout
from launch.planner.search import Candidate

UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
FLOPS = (("TFLOP", 1e12), ("GFLOP", 1e9), ("MFLOP", 1e6), ("FLOP", 1.0))


def human_bytes(size: float) -> str:
    """`1.50 GiB`: three digits and a binary unit."""
    for unit in UNITS[:-1]:
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.2f} {unit}"
        size /= 1024
    return f"{size:.2f} {UNITS[-1]}"


def human_flops(count: float) -> str:
    unit, size = next(((unit, size) for unit, size in FLOPS if count >= size), FLOPS[-1])
    return f"{count / size:,.3f} {unit}"


def render(plan: dict[str, Any], console: Console) -> None:
    """Print the plan: facts, bytes per rank by part, bytes sent, the engine's configuration."""
    layout, model, used = plan["layout"], plan["model"], plan["bytes_per_rank"]
    degrees = " × ".join(f"{layout[axis]} {axis}" for axis in ("data", "tensor", "pipeline", "sequence"))
    for name, value in (
        ("layout", f"{layout['world']} rank{'s' * (layout['world'] > 1)} = {degrees}, on {plan['device']}"),
        ("batch", plan["batch"]["line"]),
        ("parameters", f"{model['parameters']:,} in {model['layers']} layers, {model['precision']}{_shares(model)}"),
        (
            f"{plan['unit']} per step",
            f"{plan['tokens_per_step']:,}",
        ),
        ("arithmetic per step", human_flops(plan["flops_per_step"])),
    ):
        console.print(f"{name:<21}{value}", markup=False)
    if len(plan["stages"]) > 1:
        schedule = {"1f1b": "1F1B", "dualpipev": "DualPipeV"}[layout["schedule"]]
        console.print(f"{'bubble':<21}{plan['bubble']:.1%} of each step in {schedule}, predicted", markup=False)
        console.print(_stages_table(plan["stages"]))
    console.print(_memory_table(used))
    if not used["activations_known"]:
        console.print("activations: not counted, this family's forward pass cannot be traced without values")
    if any(name != "total" for name in plan["bytes_sent_per_rank_and_step"]):
        console.print(_sent_table(plan["bytes_sent_per_rank_and_step"], used["activations_known"]))
    console.print("engine configuration (ds_config.json)")
    console.print(json.dumps(plan["engine"], indent=2), markup=False)


def render_search(found: list[Candidate], speeds: list[float], console: Console) -> None:
    """Print the legal layouts, then each reason against the others with the layouts it is against."""
    rate, bandwidth = speeds
    legal = [candidate for candidate in found if candidate.plan is not None]
    if legal:
        speeds_said = f"{rate / 1e12:g} TFLOP/s and {bandwidth / 1e9:g} GB/s per rank"
        console.print(f"data × tensor × pipeline × sequence (V: DualPipeV); predicted at {speeds_said}", markup=False)
        table = Table("layout", "step", "bubble", "bytes", "sent", "batch")
        for column in table.columns:
            column.no_wrap = True
        for candidate in legal:
            plan = candidate.plan
            assert plan is not None
            unknown = _unknown(plan["bytes_per_rank"])
            table.add_row(
                _short(candidate.layout),
                f"{candidate.seconds:.3g} s",
                f"{plan['bubble']:.0%}",
                human_bytes(plan["bytes_per_rank"]["device"]["total"]) + unknown,
                human_bytes(plan["bytes_sent_per_rank_and_step"]["total"]),
                f"{plan['batch']['micro_size']} micro × {plan['batch']['accumulation']}",
            )
        console.print(table)
    reasons: dict[str, list[str]] = {}
    for candidate in found:
        for why in candidate.why_not:
            reasons.setdefault(why, []).append(_short(candidate.layout))
    for why, against in reasons.items():
        console.print(f"illegal: {why}\n    {', '.join(against)}", markup=False)


def _short(layout: Layout) -> str:
    folded = " V" if layout.stages > layout.pipeline else ""
    return f"{layout.data}×{layout.tensor}×{layout.pipeline}×{layout.sequence}{folded}"


def _unknown(used: dict[str, Any]) -> str:
    """What a total of bytes lacks."""
    return "" if used["activations_known"] else " + activations"


def _shares(model: dict[str, Any]) -> str:
    head = "head tied to it" if model["tied"] else f"head {model['head']:,}"
    return f" (embedding {model['embedding']:,}, {head})"


def _memory_table(used: dict[str, Any]) -> Table:
    """One row per part; the columns of host and NVMe only where something is offloaded."""
    places = [place for place in ("device", "host", "nvme") if place == "device" or used[place]["total"]]
    table = Table("bytes per rank", *places, title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    for part in used["device"]:
        sizes = [used[place].get(part, 0) for place in places]
        unknown = part == "activations" and not used["activations_known"]
        cells = ["?" if unknown and not size else human_bytes(size) for size in sizes]
        if part == "total":
            table.add_section()
            cells[0] += _unknown(used)
        table.add_row(part, *cells)
    return table


def _stages_table(stages: list[dict[str, Any]]) -> Table:
    """One row per rank of the pipeline; the tables below it are of the one with the most."""
    table = Table("stage", "layers", "parameters", "work", "bytes", "sent")
    for column in table.columns:
        column.no_wrap = True
    for column in table.columns[2:]:
        column.justify = "right"
    for index, stage in enumerate(stages):
        table.add_row(
            str(index),
            ", ".join(f"{first} - {stop - 1}" if stop - 1 > first else str(first) for first, stop in stage["layers"]),
            f"{stage['parameters']:,}",
            f"{stage['share_of_work']:.1%}",
            human_bytes(stage["bytes_per_rank"]["device"]["total"]),
            human_bytes(stage["bytes_sent_per_rank_and_step"]["total"]),
        )
    return table


def _sent_table(sent: dict[str, int], known: bool) -> Table:
    """known: whether the sizes of activations are; what is sent of them has none otherwise."""
    table = Table("bytes sent per rank and step", "")
    table.columns[1].justify = "right"
    lacking = not known and not all(sent.values())
    for name, size in sent.items():
        if name == "total":
            table.add_section()
            table.add_row(name, human_bytes(size) + (" + activations" if lacking else ""))
        else:
            table.add_row(name, human_bytes(size) if known or size else "?")
    return table
