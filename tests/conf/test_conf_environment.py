"""What the machine is said to have, against what torch and the tools say themselves."""

from __future__ import annotations

import shutil

import pytest

from conf import environment
from conf.environment import Environment, detect


def test_detect_agrees_with_torch():
    torch = pytest.importorskip("torch")
    found = detect()
    assert found.device in ("cpu", "cuda")
    if found.device == "cuda":
        assert torch.version.cuda
    else:
        assert found.fp16_supported == torch.ops.mkldnn._is_mkldnn_fp16_supported()
    assert found.compiler == (shutil.which("c++") is not None)
    assert environment._torch_has_cuda() == (torch.version.cuda is not None)


def test_a_missing_compiler_is_seen(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert detect().compiler is False
    assert any("compiler" in part for part in detect().missing_toolchain())


@pytest.mark.parametrize(
    ("visible", "answer", "expected"),
    [
        (None, "9.0\n9.0\n", [9.0, 9.0]),
        ("0", "9.0\n9.0\n", [9.0]),
        ("", "9.0\n", []),
        ("-1", "9.0\n", []),
        (None, "[N/A]\n", [None]),
        ("1", "8.0\n9.0\n", [9.0]),  # of all that there are
        ("1,0", "8.0\n9.0\n", [9.0, 8.0]),
        ("0,5,1", "9.0\n9.0\n", [9.0]),  # CUDA looks no further than a number that is none
        ("GPU-3f2a", "8.0\n9.0\n", [None]),
    ],
)
def test_gpus_that_are_visible(monkeypatch, visible, answer, expected):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(environment.shutil, "which", lambda name: f"/usr/bin/{name}")

    class Answer:
        stdout = answer

    monkeypatch.setattr(environment.subprocess, "run", lambda *a, **k: Answer)
    assert environment._gpus() == expected


def test_old_gpus_have_no_fp16(monkeypatch):
    monkeypatch.setattr(environment, "_torch_has_cuda", lambda: True)
    monkeypatch.setattr(environment, "_gpus", lambda: [6.0])
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    assert (detect().device, detect().fp16_supported) == ("cuda", False)
    monkeypatch.setenv("DS_ALLOW_DEPRECATED_FP16", "1")
    assert detect().fp16_supported is True
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert detect().device == "cpu"


def test_cpu_on_a_machine_with_gpus():
    gpu = Environment(device="cuda", device_count=8, fp16_supported=True)
    assert gpu.on("cpu").fp16_supported is False
    assert gpu.on("auto") is gpu
    assert gpu.on("cuda") is gpu


def test_nvcc_is_looked_for_where_torch_looks(monkeypatch, tmp_path):
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert detect().cuda_compiler is False
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").touch()
    assert detect().cuda_compiler is True
    monkeypatch.delenv("CUDA_HOME")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    (tmp_path / "bin" / "nvcc").chmod(0o755)
    assert detect().cuda_compiler is True
    assert not Environment().missing_cuda_toolchain()
    assert "nvcc" in Environment(cuda_compiler=False).missing_cuda_toolchain()[0]
