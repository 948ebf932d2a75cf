"""The checkpoints of a run: `python launch/checkpoints.py RUN_DIR [verify=true] [keep=N] [export=DIR [step=N]]`.

Lists them, newest first. verify=true reads every file and compares it with what was written; keep=N deletes all but the
newest N whole ones, and what no save ever finished; export=DIR writes the model of the newest whole one, or of step N,
as a Hugging Face folder. None is ever converted: any layout reads what any other has written. Exit code 1 where one is
damaged.
"""

from __future__ import annotations

import sys
from pathlib import Path

# Started as a script, launch/ is on sys.path; the rooms are found from the repository root, from any working directory.
if Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from filelock import FileLock, Timeout

from conf.errors import Problem, RequestError, did_you_mean
from launch.runtime.checkpoint import MANIFEST, Checkpoint, all_of, newest, unfinished
from launch.runtime.request import run_command, split_arguments, told_apart
from recipes import durable

COMMAND = "launch/checkpoints.py"
USAGE = f"{COMMAND} RUN_DIR [verify=true] [keep=N] [export=DIR [step=N]]"
OWN = {"verify": "false", "keep": "", "export": "", "step": ""}


def main(argv: list[str]) -> int:
    if "--help" in argv or "-h" in argv:
        print(f"usage: {USAGE}\n\n{__doc__}")
        return 0
    words, own = split_arguments(argv, OWN)
    folder = _folder(words)
    for key, legal in (
        ("verify", own["verify"] in ("true", "false")),
        ("keep", own["keep"] == "" or _count(own["keep"])),
    ):
        if not legal:
            rule = "true or false" if key == "verify" else "a number of checkpoints, 1 or more"
            raise RequestError(Problem(key, own[key], rule, f"{key}={'true' if key == 'verify' else 2}"))
    if own["export"]:
        return _export(folder, own["export"], own["step"])
    if own["step"]:
        raise RequestError(Problem("step", own["step"], "only an export is of one step", "export=DIR step=N"))
    keep = int(own["keep"]) if own["keep"] else None
    if keep is not None:
        try:
            FileLock(folder.parent / ".lock").acquire(timeout=0)
        except Timeout:
            rule = "a run is at work in it, and deletes old ones by itself (checkpoint.keep)"
            raise RequestError(Problem("keep", own["keep"], rule, "leave keep out, or wait for its end")) from None
    whole, damaged, stays = 0, 0, False
    for entry, found in all_of(folder):
        damage = _damage(entry, found, keep is not None or own["verify"] == "true")
        whole, damaged = whole + (not damage), damaged + bool(damage)
        gone = keep is not None and not damage and whole > keep
        stays |= gone and not durable.remove(entry)
        ending = _ending(entry) if gone else ""
        print(_line(entry, found) + ending + "".join(f"\n  damaged: {what}" for what in damage))
    for left in unfinished(folder):
        stays |= keep is not None and not durable.remove(left)
        print(f"{left.name}  not finished" + (_ending(left) if keep is not None else ""))
    return 1 if damaged or stays else 0


def _ending(entry: Path) -> str:
    """What became of a folder that was to be deleted."""
    left = [path for path in (entry, durable.beside(entry)) if path.exists()]
    return f", cannot be deleted: {left[0]}" if left else ", deleted"


def _export(folder: Path, out: str, step: str) -> int:
    target = Path(out).expanduser()
    if target.exists():
        raise RequestError(Problem("export", out, "exists already and is never overwritten", "another folder"))
    steps = {str(found.step): found for _, found in all_of(folder) if found is not None}
    if step and step not in steps:
        rule = f"this run has checkpoints of {', '.join(steps) or 'no step'}"
        raise RequestError(Problem("step", step, rule, f"step={next(iter(steps), 'N')}"))
    found = steps[step] if step else newest(folder, lambda text: print(text, file=sys.stderr))
    damage = found.damage() if found is not None else ["none of them is whole"]
    if found is None or damage:
        raise RequestError(Problem("step", step or "newest", "; ".join(damage), "the step of a whole one"))

    from launch.runtime.export import export_saved
    from launch.runtime.resume import config_of
    from launch.runtime.state import SavedState
    from recipes import recipe_class

    cfg = config_of(found, lambda text: print(text, file=sys.stderr))
    recipe = recipe_class(cfg.task)(cfg)
    recipe.prepare()
    saved = SavedState(found.files, found.manifest["tensors"], found.manifest["layout"]["tensor"])
    export_saved(saved, recipe, target)
    print(f"model after step {found.step}  {target}")
    return 0


def _folder(words: list[str]) -> Path:
    folders, unknown = told_apart(words, ())
    unknown += [word for word in folders if word.startswith("-")]
    if unknown:
        near = did_you_mean(unknown[0].partition("=")[0], OWN) or next(iter(OWN))
        raise RequestError(Problem(unknown[0], "", f"{COMMAND} has no such argument", f"{near}=…"))
    if len(words) != 1:
        raise RequestError(Problem("RUN_DIR", " ".join(words), "the directory of one run", USAGE))
    run_dir = Path(words[0]).expanduser()
    folder = run_dir / "checkpoints"
    if not folder.is_dir():
        rule = "has no checkpoints" if run_dir.is_dir() else "there is no such folder"
        raise RequestError(Problem("RUN_DIR", words[0], rule, "a run directory; checkpoint.every=N saves in one"))
    return folder


def _count(text: str) -> bool:
    return text.isascii() and text.isdigit() and int(text) > 0


def _damage(entry: Path, found: Checkpoint | None, read: bool) -> list[str]:
    if found is None:
        return [f"{entry / MANIFEST} cannot be read"]
    return found.damage() if read else []


def _line(entry: Path, found: Checkpoint | None) -> str:
    if found is None:
        return entry.name
    manifest = found.manifest
    layout = " × ".join(f"{manifest['layout'][axis]} {axis}" for axis in ("data", "tensor", "pipeline", "sequence"))
    size = sum(file["bytes"] for file in manifest["files"].values())
    return f"{entry.name}  {size / 2**20:,.1f} MiB  {layout}, ZeRO-{manifest['zero']}  {manifest['written'][:19]}"


if __name__ == "__main__":
    run_command(main)
