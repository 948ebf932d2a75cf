"""Rules on the optimizer and the arithmetic, as DeepSpeed 0.19.8 takes them (engine.py: _configure_basic_optimizer)."""

from __future__ import annotations

from collections.abc import Iterator

from conf.batch import Layout
from conf.environment import Environment
from conf.errors import Problem, did_you_mean
from conf.rules_values import changed, shown
from conf.schema import Config

OPTIMIZERS: dict[str, tuple[str, ...]] = {
    "adamw": ("betas", "eps", "fused"),
    "adam": ("betas", "eps", "fused"),
    "adagrad": ("eps",),
    "lion": ("betas",),
    "lamb": ("betas", "eps"),
    "muon": ("betas", "eps", "momentum"),
    "sgd": ("momentum", "fused"),
    "adadelta": ("eps",),
    "adafactor": (),
    "adamax": ("betas", "eps"),
    "asgd": (),
    "nadam": ("betas", "eps"),
    "radam": ("betas", "eps"),
    "rmsprop": ("eps", "momentum"),
}
"""Name → the optional fields it takes. The first six are the engine's own, the rest are classes of torch.optim.

All take `lr` and `weight_decay`."""

OPTIONAL = ("betas", "eps", "momentum", "fused")
REMOVED = ("onebitadam", "zerooneadam", "onebitlamb")
UNFIT = {
    "lbfgs": "evaluates the loss several times per step, which the engine does not do",
    "sparseadam": "takes sparse gradients only",
    "rprop": "takes no weight decay and is meant for the whole data set in one batch",
    "muadam": "needs base shapes (mup) that no recipe sets",
    "muadamw": "needs base shapes (mup) that no recipe sets",
    "musgd": "needs base shapes (mup) that no recipe sets",
}
WITH_CPU_KERNEL = ("adamw", "adam", "adagrad", "lion", "muon")
"""Optimizers whose offloaded step the engine has on CPUs (Muon: its Adam half, the rest in torch)."""

SCALING = ("loss_scale", "initial_scale_power", "loss_scale_window")
MODEL_DTYPE = {"fp32": "fp32", "bf16": "bf16", "fp16": "fp16", "bf16_autocast": "fp32"}


def known(cfg: Config, layout: Layout, env: Environment) -> Iterator[Problem]:
    """The optimizer exists in this engine or in torch.optim."""
    name = cfg.optimizer.name.lower()
    if name in OPTIMIZERS:
        return
    if name in REMOVED:
        rule = "DeepSpeed 0.19.8 has removed its 1-bit and 0/1 optimizers"
        nearest = "optimizer=lamb" if "lamb" in name else "optimizer=adamw"
        yield Problem("optimizer.name", cfg.optimizer.name, rule, nearest)
    elif name in UNFIT:
        yield Problem("optimizer.name", cfg.optimizer.name, UNFIT[name], "optimizer=adamw")
    else:
        near = did_you_mean(name, OPTIMIZERS) or "adamw"
        rule = f"one of {', '.join(OPTIMIZERS)}"
        yield Problem("optimizer.name", cfg.optimizer.name, rule, f"optimizer.name={near}")


def fields(cfg: Config, layout: Layout, env: Environment) -> Iterator[Problem]:
    """Fields that an optimizer takes are given, the others are null."""
    name = cfg.optimizer.name.lower()
    if name not in OPTIMIZERS:
        return
    for field in OPTIONAL:
        value, taken = getattr(cfg.optimizer, field), field in OPTIMIZERS[name]
        if value is not None and not taken:
            yield Problem(f"optimizer.{field}", shown(value), f"{name} takes no {field}", f"optimizer.{field}=null")
        elif value is None and taken and field != "fused":
            example = {"betas": "[0.9,0.95]", "eps": "1e-8", "momentum": "0.9"}[field]
            rule = f"{name} takes {field}, and every value is explicit"
            yield Problem(f"optimizer.{field}", "null", rule, f"optimizer.{field}={example}")


def fused(cfg: Config, layout: Layout, env: Environment) -> Iterator[Problem]:
    """A fused kernel of torch and an offloaded step exclude each other."""
    if cfg.optimizer.fused and cfg.zero.offload_optimizer != "none":
        rule = f"the offloaded step (zero.offload_optimizer={cfg.zero.offload_optimizer}) has the engine's own kernel"
        yield Problem("optimizer.fused", "true", rule, "optimizer.fused=null")


def needs_cuda(cfg: Config, layout: Layout, env: Environment) -> Iterator[Problem]:
    """Lion and LAMB are CUDA kernels of the engine, compiled at start; Lion also has an offloaded one for CPUs."""
    name = cfg.optimizer.name.lower()
    if name not in ("lion", "lamb"):
        return
    if env.device == "cuda":
        offloaded = cfg.zero.offload_optimizer != "none"
        if not offloaded and f"fused_{name}" not in env.prebuilt and (missing := env.missing_cuda_toolchain()):
            rule = f"the engine compiles its kernel of {name}, and here is no {', no '.join(missing)}"
            yield Problem("optimizer.name", name, rule, "install it, or optimizer=adamw")
    elif name == "lamb":
        yield Problem("optimizer.name", name, "the engine has LAMB for CUDA only", "optimizer=adamw")
    elif cfg.zero.offload_optimizer == "none":
        rule = "the engine has Lion for CUDA, and for CPUs with offload only"
        yield Problem("optimizer.name", name, rule, "zero=stage2_offload, or optimizer=adamw")


def whole_parameters(cfg: Config, layout: Layout, env: Environment) -> Iterator[Problem]:
    """LAMB and Adafactor look at whole parameters; from stage 1 on an optimizer sees flat shards of many."""
    name = cfg.optimizer.name.lower()
    if name in ("lamb", "adafactor") and cfg.zero.stage > 0:
        rule = f"{name} looks at whole parameters, ZeRO stage {cfg.zero.stage} gives it flat shards of several"
        yield Problem("optimizer.name", name, rule, "zero=stage0, or optimizer=adamw")


def lamb_scale(cfg: Config, layout: Layout, env: Environment) -> Iterator[Problem]:
    """The engine asserts a dynamic loss scale for LAMB (engine.py: _do_sanity_check)."""
    if cfg.optimizer.name.lower() == "lamb" and cfg.precision.name == "fp16" and cfg.precision.loss_scale > 0:
        rule = "LAMB needs a dynamic loss scale"
        yield Problem("precision.loss_scale", shown(cfg.precision.loss_scale), rule, "precision.loss_scale=0")


def muon(cfg: Config, layout: Layout, env: Environment) -> Iterator[Problem]:
    """Muon and ZeRO++'s quantised gradients exclude each other (stage3.py: all2all process group)."""
    if cfg.optimizer.name.lower() == "muon" and cfg.zero.quantized_gradients:
        rule = "Muon needs whole gradients, quantised ones are reduced in shards"
        yield Problem("zero.quantized_gradients", "true", rule, "zero.quantized_gradients=false, or optimizer=adamw")


def muon_clipping(cfg: Config, layout: Layout, env: Environment) -> Iterator[Problem]:
    """From stage 1 on, 0.19.8 clips Muon's orthogonalised update, whose norm has nothing to do with the gradient's.

    Stage 0 clips the gradient: the same configuration would train another model at another stage.
    """
    optimizer = cfg.optimizer
    if optimizer.name.lower() == "muon" and cfg.zero.stage > 0 and optimizer.gradient_clipping > 0:
        rule = f"at ZeRO stage {cfg.zero.stage} the engine would clip Muon's update instead of the gradient"
        value = shown(optimizer.gradient_clipping)
        yield Problem("optimizer.gradient_clipping", value, rule, "optimizer.gradient_clipping=0, or zero=stage0")


def adagrad(cfg: Config, layout: Layout, env: Environment) -> Iterator[Problem]:
    """From stage 1 on, 0.19.8 rebuilds torch's Adagrad without its parameter groups, out of the scheduler's reach.

    stage_1_and_2.py and stage3.py, initialize_optimizer_states: the first step dies, or with one group the learning
    rate would stay at its peak in silence. The offloaded Adagrad is the engine's own and is not rebuilt.
    """
    if cfg.optimizer.name.lower() == "adagrad" and cfg.zero.stage > 0 and cfg.zero.offload_optimizer == "none":
        rule = f"DeepSpeed 0.19.8 loses Adagrad's parameter groups and schedule at ZeRO stage {cfg.zero.stage}"
        yield Problem("optimizer.name", "adagrad", rule, "zero=stage0, zero=stage2_offload, or optimizer=adamw")


def device_dtype(cfg: Config, layout: Layout, env: Environment) -> Iterator[Problem]:
    """The device can compute in the precision asked for."""
    name = cfg.precision.name
    if name == "fp16" and not env.fp16_supported:
        nearest = "precision=bf16" if env.bf16_supported else "precision=fp32"
        yield Problem("precision", name, f"this {_device(env)} has no fp16 arithmetic that the engine accepts", nearest)
    if name in ("bf16", "bf16_autocast") and not env.bf16_supported:
        yield Problem("precision", name, f"this {_device(env)} has no bf16 arithmetic", "precision=fp32")


def _device(env: Environment) -> str:
    return "GPU" if env.device == "cuda" else "CPU"


def loss_scaling(cfg: Config, layout: Layout, env: Environment) -> Iterator[Problem]:
    """Loss scaling is for fp16; the first scale and its window for a dynamic one."""
    precision = cfg.precision
    for field in SCALING:
        if not changed(precision, field):
            continue
        key, value = f"precision.{field}", shown(getattr(precision, field))
        if precision.name != "fp16":
            yield Problem(key, value, f"only fp16 scales the loss, not {precision.name}", "precision=fp16")
        elif field != "loss_scale" and precision.loss_scale > 0:
            rule = f"a static scale (precision.loss_scale={shown(precision.loss_scale)}) never changes"
            yield Problem(key, value, rule, "precision.loss_scale=0")


def accumulation_dtypes(stage: int, precision: str) -> tuple[str, ...]:
    """Legal `precision.accumulation_dtype`, best first.

    Stage 0 has no gradient buffer of another dtype: 0.19.8 raises NotImplementedError ("unsupported mix") unless
    gradients accumulate in the parameters' own dtype (engine.py: _do_optimizer_sanity_check).
    """
    model = MODEL_DTYPE[precision]
    return tuple(dict.fromkeys((model,) if stage == 0 else ("fp32", model)))


def accumulation(cfg: Config, layout: Layout, env: Environment) -> Iterator[Problem]:
    """Gradients accumulate in a dtype that the stage and the precision allow."""
    asked = cfg.precision.accumulation_dtype
    if cfg.precision.name not in MODEL_DTYPE:
        return
    legal = accumulation_dtypes(cfg.zero.stage, cfg.precision.name)
    if asked in legal:
        return
    model = MODEL_DTYPE[cfg.precision.name]
    if asked == "fp32":
        rule = f"ZeRO stage 0 accumulates gradients in the parameters' dtype, {model}"
        nearest = f"zero=stage1, or precision.accumulation_dtype={model}"
    else:
        rule = f"with precision={cfg.precision.name} and ZeRO stage {cfg.zero.stage}: {' or '.join(legal)}"
        nearest = f"precision.accumulation_dtype={legal[0]}"
    yield Problem("precision.accumulation_dtype", asked, rule, nearest)


RULES = (
    known,
    fields,
    fused,
    needs_cuda,
    whole_parameters,
    lamb_scale,
    muon,
    muon_clipping,
    adagrad,
    device_dtype,
    loss_scaling,
    accumulation,
)
