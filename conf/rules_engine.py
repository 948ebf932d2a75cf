"""Rules on `deepspeed.*`, the raw engine keys, against the engine's own schema (conf/engine_schema.json).

The engine ignores unknown top-level keys in silence, and unknown keys inside some blocks. Here each is refused, and so
is what the rest of our configuration already says: one truth per setting.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from typing import Any

from conf.batch import Layout
from conf.engine_keys import NO_EFFECT, OURS
from conf.environment import Environment
from conf.errors import Problem, did_you_mean
from conf.overrides import CONF_DIR
from conf.rules_values import shown
from conf.schema import Config

Node = dict[str, Any]
IN_WORDS = {
    "boolean": "true or false",
    "integer": "a whole number",
    "number": "a number",
    "string": "text",
    "array": "a list",
    "object": "a mapping",
    "null": "null",
}


@cache
def engine_schema() -> Node:
    """Legal keys, their types, and removed keys with the engine's reasons, of the deepspeed this was generated from."""
    return json.loads((CONF_DIR / "engine_schema.json").read_text(encoding="utf-8"))


def keys(cfg: Config, layout: Layout, env: Environment) -> Iterator[Problem]:
    """Every key exists in the engine, has its type, is not removed, and is not said elsewhere in our configuration."""
    yield from _walk(cfg.deepspeed, {"types": ["object"], "keys": engine_schema()["keys"]}, "")


def _walk(values: dict[str, Any], node: Node, path: str) -> Iterator[Problem]:
    for name, value in values.items():
        dotted = f"{path}{name}"
        key, text = f"deepspeed.{dotted}", shown(value)
        removed = engine_schema()["removed"].get(dotted)
        known = node["keys"].get(name)
        if removed:
            version = engine_schema()["deepspeed"]
            yield Problem(key, text, f"removed from DeepSpeed {version}: {removed.split(' See ')[0]}", "leave it out")
        elif known is None:
            yield Problem(key, text, "no such key in the engine", _nearest(name, dotted, node, value))
        else:
            yield from _known(known, dotted, value)


def _known(node: Node, dotted: str, value: Any) -> Iterator[Problem]:
    """The problems of a key that exists."""
    key, text = f"deepspeed.{dotted}", shown(value)
    if "deprecated" in node:
        sibling = f"{dotted.rpartition('.')[0]}.{node['deprecated']}".lstrip(".")
        yield Problem(key, text, "a second name of a key that goes by one name here", f"deepspeed.{sibling}")
    elif value == "auto":
        yield Problem(key, text, 'every value is explicit, none is "auto"', "leave it out, or give a value")
    elif isinstance(value, dict) and "keys" in node:
        wrong = list(_walk(value, node, f"{dotted}."))
        ours = _said_elsewhere(dotted, value)
        yield from wrong or ([ours] if ours else [])
    elif not any(_is(kind, value) for kind in node["types"]):
        yield Problem(key, text, f"must be {' or '.join(IN_WORDS[kind] for kind in node['types'])}", "leave it out")
    elif "choices" in node and value not in node["choices"]:
        near = did_you_mean(str(value), [choice for choice in node["choices"] if isinstance(choice, str)])
        rule = f"one of {', '.join(shown(choice) for choice in node['choices'])}"
        yield Problem(key, text, rule, f"{key}={near or shown(node['choices'][0])}")
    elif limit := _beyond(node, value):
        yield Problem(key, text, f"must be {limit}", "leave it out")
    elif ours := _said_elsewhere(dotted, value):
        yield ours


def _is(kind: str, value: Any) -> bool:
    """Whether a value has a JSON type; whole floats such as 5e8 count as integers, as they do for the engine."""
    if kind == "null" or value is None:
        return value is None and kind == "null"
    if isinstance(value, bool):
        return kind == "boolean"
    if kind == "integer":
        return isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    legal: dict[str, Any] = {"number": (int, float), "string": str, "array": list, "object": dict, "boolean": bool}
    return isinstance(value, legal[kind])


def _beyond(node: Node, value: Any) -> str:
    """The limit that a number is beyond, in words; empty when it is within."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return ""
    limits = {
        "min": (lambda limit: value >= limit, "at least"),
        "max": (lambda limit: value <= limit, "at most"),
        "above": (lambda limit: value > limit, "greater than"),
        "below": (lambda limit: value < limit, "less than"),
    }
    for name, (holds, words) in limits.items():
        if name in node and not holds(node[name]):
            return f"{words} {node[name]:g}"
    return ""


def _said_elsewhere(dotted: str, value: Any) -> Problem | None:
    """The refusal of a key that our own configuration sets, or that does nothing in it."""
    key, text = f"deepspeed.{dotted}", shown(value)
    if dotted in OURS:
        ours = OURS[dotted]
        simple = not isinstance(value, (dict, list)) and "=" not in ours and "." in ours
        return Problem(key, text, "our own configuration sets this", f"{ours}={text}" if simple else ours)
    if dotted in NO_EFFECT:
        return Problem(key, text, NO_EFFECT[dotted], "leave it out")
    return None


def _nearest(name: str, dotted: str, node: Node, value: Any) -> str:
    """What was probably meant by a misspelt engine key: a sibling, else a key anywhere, or ours in its place."""
    meant = did_you_mean(name, node["keys"])
    if meant:
        meant = dotted[: len(dotted) - len(name)] + meant
    else:
        anywhere = {path.rpartition(".")[2]: path for path in _paths(engine_schema()["keys"], "")}
        meant = anywhere.get(did_you_mean(name, anywhere), "")
    if not meant:
        return "leave it out"
    parts = meant.split(".")
    for end in range(1, len(parts) + 1):
        if ours := _said_elsewhere(".".join(parts[:end]), value if end == len(parts) else {}):
            return ours.nearest
    return f"deepspeed.{meant}.…" if isinstance(value, dict) else f"deepspeed.{meant}={shown(value)}"


def _paths(nodes: dict[str, Node], prefix: str) -> Iterator[str]:
    for name, node in nodes.items():
        yield f"{prefix}{name}"
        yield from _paths(node.get("keys", {}), f"{prefix}{name}.")


def dtypes(cfg: Config, layout: Layout, env: Environment) -> Iterator[Problem]:
    """One arithmetic: fp16, bf16 and autocast exclude each other (the engine takes bf16 with autocast in silence)."""
    ours = {"fp16": "fp16", "bf16": "bf16", "bf16_autocast": "torch_autocast"}.get(cfg.precision.name)
    on = {name for name in ("fp16", "bf16", "torch_autocast") if _at(cfg, f"{name}.enabled") is True}
    both = sorted(on | ({ours} if ours else set()))
    if on and len(both) > 1:
        key = next(name for name in both if name in on and name != ours)
        rule = f"{' and '.join(both)} exclude each other"
        yield Problem(f"deepspeed.{key}", "{enabled: true}", rule, "precision=bf16_autocast, or precision=bf16")


def idle_blocks(cfg: Config, layout: Layout, env: Environment) -> Iterator[Problem]:
    """Keys of a block that is switched off would do nothing."""
    switches = {
        "fp16": (cfg.precision.name == "fp16", "precision=fp16"),
        "bf16": (cfg.precision.name == "bf16", "precision=bf16"),
        "torch_autocast": (cfg.precision.name == "bf16_autocast", "precision=bf16_autocast"),
        "zero_optimization": (cfg.zero.stage > 0, "zero=stage1"),
        "zero_optimization.offload_optimizer": (cfg.zero.offload_optimizer != "none", "zero=stage2_offload"),
        "zero_optimization.offload_param": (cfg.zero.offload_param != "none", "zero=stage3_offload"),
        "aio": ("nvme" in (cfg.zero.offload_optimizer, cfg.zero.offload_param), "zero=stage3_nvme"),
    }
    for dotted, (active, nearest) in switches.items():
        block = _at(cfg, dotted)
        if active or not isinstance(block, dict):
            continue
        for name, value in block.items():
            known = engine_schema()["keys"].get(dotted.partition(".")[0], {})
            if f"{dotted}.{name}" not in OURS and known and not isinstance(value, dict):
                rule = f"does nothing unless {nearest} or the like is chosen"
                yield Problem(f"deepspeed.{dotted}.{name}", shown(value), rule, nearest)
    block = _at(cfg, "zero_optimization")
    if isinstance(block, dict) and 0 < cfg.zero.stage < 3:
        for name, value in block.items():
            if (name.startswith("stage3_") or name == "leaf_module") and f"zero_optimization.{name}" not in OURS:
                rule = f"is read by ZeRO stage 3 only, this is stage {cfg.zero.stage}"
                yield Problem(f"deepspeed.zero_optimization.{name}", shown(value), rule, "zero=stage3")


def hardware(cfg: Config, layout: Layout, env: Environment) -> Iterator[Problem]:
    """Switches of the engine with needs of their own (runtime/zero/config.py, stage3.py of 0.19.8)."""
    zero = "zero_optimization"
    if _at(cfg, f"{zero}.zero_quantized_nontrainable_weights") is True and env.device != "cuda":
        key = f"deepspeed.{zero}.zero_quantized_nontrainable_weights"
        yield Problem(key, "true", "quantised weights run on CUDA only", "leave it out")
    offload = f"{zero}.offload_optimizer"
    if _at(cfg, f"{offload}.super_offload") is True and (env.device != "cuda" or cfg.zero.stage != 3):
        yield Problem(f"deepspeed.{offload}.super_offload", "true", "needs CUDA and ZeRO stage 3", "leave it out")
    ratio = _at(cfg, f"{offload}.ratio")
    if (
        isinstance(ratio, (int, float))
        and ratio < 1
        and (cfg.zero.stage != 3 or cfg.optimizer.name.lower() not in ("adam", "adamw"))
    ):
        rule = "a share of the optimizer is offloaded with ZeRO stage 3 and Adam only"
        yield Problem(f"deepspeed.{offload}.ratio", shown(ratio), rule, "leave it out")
    if _at(cfg, f"{zero}.reduce_scatter") is True and cfg.zero.stage == 3 and cfg.optimizer.name.lower() == "muon":
        rule = "Muon with ZeRO stage 3 needs whole gradients"
        yield Problem(f"deepspeed.{zero}.reduce_scatter", "true", rule, "leave it out")
    for name in ("fp16.fp16_master_weights_and_grads", "bf16.bf16_master_weights_and_grads"):
        kept = name.startswith("bf16") and _at(cfg, "bf16.bf16_optimizer_states") is True
        offloaded = cfg.zero.offload_optimizer != "none" and cfg.optimizer.name.lower() in ("adam", "adamw")
        if _at(cfg, name) is True and not (offloaded or (kept and cfg.zero.stage > 0)):
            rule = "16-bit master weights need the offloaded step of Adam"
            yield Problem(f"deepspeed.{name}", "true", rule, "zero=stage2_offload optimizer=adamw")
    if _at(cfg, "bf16.bf16_optimizer_states") is True and _at(cfg, "bf16.bf16_master_weights_and_grads") is not True:
        needed = "bf16_master_weights_and_grads"
        nearest = f"deepspeed.bf16.{needed}=true"
        yield Problem("deepspeed.bf16.bf16_optimizer_states", "true", f"needs {needed}", nearest)


def _at(cfg: Config, dotted: str) -> Any:
    """The value the user gave to an engine key, or None."""
    value: Any = cfg.deepspeed
    for name in dotted.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value


RULES = (keys, dtypes, idle_blocks, hardware)
