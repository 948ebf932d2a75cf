"""Copy a trained model in another dtype or shard size: `python launch/export.py RUN_DIR out=DIR [dtype=bf16]`."""

from __future__ import annotations

import sys
from pathlib import Path

# Started as a script, launch/ is on sys.path; the rooms are found from the repository root, from any working directory.
if Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from conf.errors import Problem, RequestError, did_you_mean
from launch.runtime.request import run_command, told_apart

USAGE = "launch/export.py RUN_DIR|MODEL_DIR out=DIR [dtype=fp32|bf16|fp16] [shard_mb=4096]"
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
KEYS = ("out", "dtype", "shard_mb")


def main(argv: list[str]) -> int:
    if any(argument in ("-h", "--help") for argument in argv):
        print(USAGE)
        return 0
    words, pairs = told_apart(argv, KEYS)
    sources = [Path(word).expanduser() for word in words]
    options = dict(pair.split("=", 1) for pair in pairs)
    problems = [
        Problem(key, value, "no such key of this command", did_you_mean(key, KEYS) or USAGE)
        for key, value in options.items()
        if key not in KEYS
    ]
    if len(sources) != 1:
        problems.append(Problem("RUN_DIR", " ".join(map(str, sources)), "one run or model folder is exported", USAGE))
    elif not sources[0].is_dir():
        problems.append(Problem("RUN_DIR", str(sources[0]), "there is no such folder", USAGE))
    if "out" not in options:
        problems.append(Problem("out", "", "where to write the model must be named", f"{USAGE}"))
    elif Path(options["out"]).expanduser().exists():
        problems.append(Problem("out", options["out"], "exists already and is never overwritten", "another folder"))
    if options.get("dtype", "fp32") not in DTYPES:
        problems.append(Problem("dtype", options["dtype"], f"one of {', '.join(DTYPES)}", "dtype=bf16"))
    shard = options.get("shard_mb", "4096")
    if not (shard.isascii() and shard.isdigit()) or int(shard) < 1:
        problems.append(Problem("shard_mb", shard, "a positive number of megabytes", "shard_mb=4096"))
    if problems:
        raise RequestError(problems)

    import torch

    from launch.runtime.export import convert

    source, out = sources[0], Path(options["out"]).expanduser()
    if (source / "model").is_dir():
        source = source / "model"
    dtype = getattr(torch, DTYPES[options["dtype"]]) if "dtype" in options else None
    convert(source, out, dtype, int(shard) * 2**20)
    print(f"model  {out}")
    return 0


if __name__ == "__main__":
    run_command(main)
