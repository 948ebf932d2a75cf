"""What a run says of an evaluation, and in the end."""

from __future__ import annotations

from typing import Any

NOT_SHOWN = ("step", "split", "loss", "eval_s")


def others(row: dict[str, Any]) -> str:
    """The metrics of an evaluation besides its loss, as a person reads them."""
    shown = {name: value for name, value in row.items() if name not in NOT_SHOWN}
    return "".join(
        f", {name} {value:,.1f}" if name == "perplexity" else f", {name} {value:.4g}" for name, value in shown.items()
    )


def closing(summary: dict[str, Any], curve: str) -> str:
    """The last words of a run. curve: where its picture is, or why it is not."""
    before, after, kept = summary["held_out_before"], summary["held_out"], summary["kept_at_step"]
    lines = [
        "",
        f"held-out loss {before['loss']:.4f} -> {after['loss']:.4f}{others(after)}"
        f"   ({summary['tokens']:,} {summary['unit']} in {summary['train_s']:.0f} s)",
        f"curve  {curve}",
        f"model  {summary['model']}" + (f"   (of step {kept}, the best)" if kept != summary["steps"] else ""),
    ]
    if summary["sample"] is not None:
        lines += ["", "the exported model continues:", *(f"  | {line}" for line in summary["sample"].splitlines())]
    return "\n".join(lines)
