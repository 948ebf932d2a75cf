"""What this machine has, as far as that shows without torch. Rules take it as an argument; tests bring their own."""

from __future__ import annotations

import ctypes.util
import importlib.util
import os
import re
import shutil
import subprocess
import sysconfig
from dataclasses import dataclass, replace
from pathlib import Path

CPU_FP16_FLAGS = {"avx512_fp16", "amx_fp16", "asimdhp"}
"""What torch's oneDNN wants of a CPU before the engine (0.19.8, cpu_accelerator.py) accepts fp16 on it."""


@dataclass(frozen=True)
class Environment:
    """Facts that decide whether a request can run here."""

    device: str = "cpu"
    """cpu | cuda: what the engine uses when nothing else is asked."""
    device_count: int = 1
    """GPUs for cuda; 1 for cpu."""
    fp16_supported: bool = False
    """By `device`."""
    bf16_supported: bool = True
    """By `device`."""
    cpu_fp16_supported: bool = False
    """By the CPU, for device=cpu on a machine with GPUs."""
    compiler: bool = True
    """A C++ compiler (CXX or c++)."""
    cuda_compiler: bool = True
    """nvcc where torch looks for it (CUDA_HOME, PATH, /usr/local/cuda), for the engine's kernels on GPUs."""
    ninja: bool = True
    python_headers: bool = True
    kernel_folder: bool = True
    """What torch keeps compiled kernels in can be written."""
    libaio: bool = False
    """libaio with its header, for NVMe offload."""
    trackers: frozenset[str] = frozenset({"tensorboard", "wandb", "mlflow"})
    """Packages of trackers that are installed."""
    prebuilt: frozenset[str] = frozenset()
    """Kernels that the installed engine carries compiled (cpu_adam, async_io, …)."""

    def on(self, device: str) -> Environment:
        """The same machine when a run asks for `device` (auto | cpu | cuda)."""
        if device == "cpu" and self.device != "cpu":
            return replace(
                self, device="cpu", device_count=1, fp16_supported=self.cpu_fp16_supported, bf16_supported=True
            )
        return self

    def elsewhere(self, ranks: int) -> Environment:
        """A machine with a GPU for each of `ranks`: what a plan for another machine than this one assumes."""
        return replace(self, device="cuda", device_count=ranks, fp16_supported=True, bf16_supported=True, libaio=True)

    def missing_toolchain(self) -> list[str]:
        """What is lacking to compile the engine's CPU kernels, in words; empty when nothing is."""
        parts = {
            "a C++ compiler (c++, or CXX)": self.compiler,
            "ninja": self.ninja,
            "the headers of this Python (Python.h)": self.python_headers,
            "folder to keep it in that can be written (TORCH_EXTENSIONS_DIR=FOLDER)": self.kernel_folder,
        }
        return [name for name, there in parts.items() if not there]

    def missing_cuda_toolchain(self) -> list[str]:
        """The same for the engine's kernels on GPUs."""
        nvcc = "CUDA compiler (nvcc in CUDA_HOME, of the CUDA version that torch was built for)"
        return self.missing_toolchain() + ([] if self.cuda_compiler else [nvcc])


def detect() -> Environment:
    """The environment of this process. Takes a few milliseconds without a GPU, one `nvidia-smi` with one."""
    cpu_fp16 = bool(_cpu_flags() & CPU_FP16_FLAGS)
    gpus = _gpus() if _torch_has_cuda() and os.environ.get("DS_ACCELERATOR", "cuda") == "cuda" else []
    # The thresholds of the engine's cuda_accelerator.py (0.19.8); an unknown capability does not count against a GPU.
    oldest = 6.0 if os.environ.get("DS_ALLOW_DEPRECATED_FP16") == "1" else 7.0
    fp16 = all(capability is None or capability >= oldest for capability in gpus) if gpus else cpu_fp16
    header = any((Path(root) / "libaio.h").is_file() for root in ("/usr/include", "/usr/local/include"))
    return Environment(
        device="cuda" if gpus else "cpu",
        device_count=len(gpus) or 1,
        fp16_supported=fp16,
        bf16_supported=True,
        cpu_fp16_supported=cpu_fp16,
        compiler=shutil.which(os.environ.get("CXX", "c++")) is not None,
        cuda_compiler=_has_nvcc(),
        ninja=shutil.which("ninja") is not None or importlib.util.find_spec("ninja") is not None,
        python_headers=(Path(sysconfig.get_paths()["include"]) / "Python.h").is_file(),
        kernel_folder=_can_be_written(_kernel_folder()),
        libaio=header and ctypes.util.find_library("aio") is not None,
        trackers=frozenset(name for name in Environment.trackers if importlib.util.find_spec(name) is not None),
        prebuilt=_prebuilt_kernels(),
    )


def _cpu_flags() -> set[str]:
    """Feature flags of the first CPU (Linux); empty elsewhere."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return set()
    found = re.search(r"^(?:flags|Features)\s*:\s*(.*)$", text, re.MULTILINE)
    return set(found.group(1).split()) if found else set()


def _package_file(package: str, name: str) -> str:
    """Text of a file of an installed package, without importing it; empty when it is not there."""
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        return ""
    path = Path(found.submodule_search_locations[0]) / name
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def _torch_has_cuda() -> bool:
    """Whether the installed torch was built for CUDA: a GPU is of no use to a CPU build."""
    return re.search(r"^cuda[^=]*=\s*['\"]", _package_file("torch", "version.py"), re.MULTILINE) is not None


def _prebuilt_kernels() -> frozenset[str]:
    """Kernels compiled when the engine was installed (DS_BUILD_OPS)."""
    text = _package_file("deepspeed", "git_version_info_installed.py")
    found = re.search(r"installed_ops\s*=\s*(\{.*?\})", text, re.DOTALL)
    return frozenset(re.findall(r"'(\w+)':\s*True", found.group(1))) if found else frozenset()


def _kernel_folder() -> Path:
    """Where torch 2.13 keeps extensions that it compiles (torch/utils/cpp_extension.py)."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path(cache) / "torch_extensions")


def _can_be_written(folder: Path) -> bool:
    """Whether there is such a folder, or it can be made."""
    try:
        there = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    except OSError:  # a folder above it may not be looked into
        return False
    # The kernel's own folders let nobody make others, whoever asks.
    return there.is_dir() and os.access(there, os.W_OK | os.X_OK) and not there.is_relative_to("/proc")


def _has_nvcc() -> bool:
    """Whether there is a CUDA compiler where torch and the engine look for one (torch/utils/cpp_extension.py)."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    places = [Path(home)] if home else [Path("/usr/local/cuda")]
    return any((place / "bin" / "nvcc").is_file() for place in places) or (not home and bool(shutil.which("nvcc")))


def _gpus() -> list[float | None]:
    """Compute capability of each visible NVIDIA GPU (None: unknown); empty without one."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    wanted = None if visible is None else [v.strip() for v in visible.split(",") if v.strip() not in ("", "-1")]
    if wanted == []:
        return []
    found: list[float | None] = []
    if shutil.which("nvidia-smi"):
        try:
            ask = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
            answer = subprocess.run(
                ask, capture_output=True, encoding="utf-8", errors="replace", timeout=10, check=True
            ).stdout
            found = [float(line) if re.fullmatch(r"[\d.]+", line) else None for line in answer.split()]
        except (OSError, subprocess.SubprocessError):
            found = []
    if not found:
        folder = Path("/proc/driver/nvidia/gpus")
        found = [None for _ in folder.iterdir()] if folder.is_dir() else []
    if wanted is None:
        return found
    # Numbers choose among all GPUs; names (GPU-…, MIG-…) are not looked up. CUDA stops at a number that is none.
    chosen: list[float | None] = []
    for name in wanted:
        if name.isdigit() and int(name) >= len(found):
            break
        chosen.append(found[int(name)] if name.isdigit() else None)
    return chosen if found else []
