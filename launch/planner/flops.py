"""Arithmetic per token and the peak of the device. Tokens/s × FLOPs / peak is the utilisation (MFU)."""

from __future__ import annotations

from launch.planner.model_shape import ModelShape

TERA = 1e12

# Dense peaks in TFLOP/s (no structured sparsity), fp32 accumulation, from NVIDIA's data sheets. Keys are the names that
# torch.cuda.get_device_name() gives. fp32 is without tensor cores; tf32 is what fp32 products use when it is allowed.
_H100_SXM = {"bf16": 989.4, "fp16": 989.4, "tf32": 494.7, "fp32": 66.9}
_A100 = {"bf16": 312.0, "fp16": 312.0, "tf32": 156.0, "fp32": 19.5}
PEAK_TFLOPS: dict[str, dict[str, float]] = {
    "NVIDIA H200": _H100_SXM,
    "NVIDIA GH200 480GB": _H100_SXM,
    "NVIDIA H100 80GB HBM3": _H100_SXM,
    "NVIDIA H100 PCIe": {"bf16": 756.0, "fp16": 756.0, "tf32": 378.0, "fp32": 51.0},
    "NVIDIA H100 NVL": {"bf16": 835.0, "fp16": 835.0, "tf32": 417.5, "fp32": 60.0},
    "NVIDIA A100-SXM4-80GB": _A100,
    "NVIDIA A100-SXM4-40GB": _A100,
    "NVIDIA A100 80GB PCIe": _A100,
    "NVIDIA A100-PCIE-40GB": _A100,
    "NVIDIA A40": {"bf16": 149.7, "fp16": 149.7, "tf32": 74.8, "fp32": 37.4},
    "NVIDIA A30": {"bf16": 165.0, "fp16": 165.0, "tf32": 82.0, "fp32": 10.3},
    "NVIDIA A10": {"bf16": 125.0, "fp16": 125.0, "tf32": 62.5, "fp32": 31.2},
    "NVIDIA L40S": {"bf16": 362.05, "fp16": 362.05, "tf32": 183.0, "fp32": 91.6},
    "NVIDIA L40": {"bf16": 181.05, "fp16": 181.05, "tf32": 90.5, "fp32": 90.5},
    "NVIDIA L4": {"bf16": 121.0, "fp16": 121.0, "tf32": 60.0, "fp32": 30.3},
    "Tesla V100-SXM2-16GB": {"fp16": 125.0, "fp32": 15.7},
    "Tesla V100-SXM2-32GB": {"fp16": 125.0, "fp32": 15.7},
    "Tesla V100-PCIE-16GB": {"fp16": 112.0, "fp32": 14.0},
    "Tesla V100-PCIE-32GB": {"fp16": 112.0, "fp32": 14.0},
    "Tesla T4": {"fp16": 65.0, "fp32": 8.1},
}


def flops_per_token(shape: ModelShape) -> float:
    """FLOPs of forward and backward for one token: 6N + 12·L·H·Q·T (PaLM, Chowdhery et al. 2022, appendix B).

    N counts the parameters that multiply: a lookup does not, so embeddings are left out, but a tied one is the head. As
    in PaLM, attention is counted over the whole sequence although the causal half would do, and recomputation by
    activation checkpointing is not counted.
    """
    multiplying = shape.parameters - shape.idle - shape.embedding + (shape.vocab * shape.hidden if shape.tied else 0)
    return 6.0 * multiplying + 12.0 * shape.layers * shape.heads * shape.head_dim * shape.seq_length


def flops_per_row(shape: ModelShape) -> float:
    """FLOPs of forward and backward for one row: of all its tokens, or three times a forward pass that was counted."""
    return 3.0 * shape.counted if shape.counted is not None else flops_per_token(shape) * shape.seq_length


def peak_flops(device_name: str, precision: str) -> float | None:
    """Dense FLOP/s of a device, or None when the device or the precision is not in the table: no guess.

    precision: fp32 | tf32 | bf16 | fp16 | bf16_autocast (whose products run in bf16).
    """
    peaks = PEAK_TFLOPS.get(device_name.strip(), {})
    peak = peaks.get("bf16" if precision == "bf16_autocast" else precision)
    return None if peak is None else peak * TERA
