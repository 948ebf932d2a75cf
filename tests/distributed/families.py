"""Every causal-LM family of transformers, tiny, in layouts of two ranks an axis, against one process.

python tests/distributed/families.py            # all: docs/models.md and recipes/models/families.json, 20 minutes
python tests/distributed/families.py llama opt  # these only, printed
"""

# ruff: noqa: E402 - started as a script, it first puts the suite on sys.path
from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [
    path for path in (str(ROOT), str(ROOT / "tests"), str(ROOT / "tests/distributed")) if path not in sys.path
]

import torch
from layouts import Case, errors, train
from ranks import run_ranks
from tiny import VOCABULARY
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from conf.schema import ParallelConfig
from recipes.models.layouts import structural

LAYOUTS = {"pipeline": (1, 2, 1), "tensor": (2, 1, 1), "tensor and pipeline": (2, 2, 1), "sequence": (1, 1, 2)}
"""Name → (tensor, pipeline, sequence)."""
RELATIVE = 1e-5
STEPS = 2
TINY: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "embed_dim", "word_embed_proj_dim", "embedding_size"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "d_ff", "ffn_hidden_size"), 64),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers"), 4),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_local_experts", "num_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 64),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_hidden_size"), 32),
    **dict.fromkeys(("moe_num_experts", "num_experts_per_layer"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts"), 2),
    **dict.fromkeys(("head_dim", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "global_head_dim"), 8),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "first_k_dense_replace"), 1),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank"), 16),
    **dict.fromkeys(("sliding_window", "attention_chunk_size"), 6),
    **dict.fromkeys(
        ("attention_dropout", "hidden_dropout", "hidden_dropout_prob", "dropout", "embd_pdrop", "resid_pdrop",
         "attn_pdrop", "activation_dropout", "attention_probs_dropout_prob", "emb_dropout_prob", "layerdrop",
         "embedding_dropout", "attn_dropout", "summary_first_dropout", "resid_dropout", "ffn_dropout",
         "router_jitter_noise"),
        0.0,
    ),
    **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 0),
    "vocab_size": VOCABULARY, "rotary_dim": 4, "qk_head_dim": 16, "max_window_layers": 4, "num_nextn_predict_layers": 0,
}  # fmt: skip
"""What makes a family small; attributes that it does not have are left out."""


def families() -> list[str]:
    """`model_type` of every causal language model of the installed transformers."""
    return [kind for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if kind in CONFIG_MAPPING]


def tiny_options(kind: str) -> dict[str, Any]:
    """transformers configuration of a tiny model of a family. Raises whatever the family raises."""
    known = CONFIG_MAPPING[kind]().to_dict()
    names = {*known, *CONFIG_MAPPING[kind].attribute_map}
    options = {name: value for name, value in TINY.items() if name in names}
    if known.get("num_key_value_heads") is None:
        options.pop("num_key_value_heads", None)
    for name in ("sliding_window", "attention_chunk_size", "q_lora_rank", "n_inner"):
        if known.get(name) is None:
            options.pop(name, None)
    if kind == "gpt_neo":
        options["attention_types"] = [[["global", "local"], 2]]
    if isinstance(known.get("layer_types"), list):
        pattern = list(dict.fromkeys(known["layer_types"]))
        options["layer_types"] = [pattern[i % len(pattern)] for i in range(4)]
    for name in ("mlp_layer_types", "layers_block_type"):
        if isinstance(known.get(name), list):
            pattern = list(dict.fromkeys(known[name]))
            options[name] = [pattern[i % len(pattern)] for i in range(4)]
    return options


def build_on_meta(kind: str, options: dict[str, Any]) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **options))


def examine(kind: str) -> dict[str, str]:
    """{layout: "" when the gradients are right, else why not} of one family."""
    try:
        options = tiny_options(kind)
        try:
            network = build_on_meta(kind, options)
        except Exception:  # some families leave a default to us that they cannot do without
            options = {**options, "num_key_value_heads": 4}
            network = build_on_meta(kind, options)
        if sum(p.numel() for p in network.parameters()) > 3_000_000:
            raise ValueError("no tiny model: its configuration nests others")
    except Exception as error:
        why = " ".join(str(error).split())[:90] or type(error).__name__
        return dict.fromkeys(LAYOUTS, f"cannot be built tiny: {why}")
    verdicts = {}
    for name, (tensor, pipeline, sequence) in LAYOUTS.items():
        refused = structural(network, ParallelConfig(tensor, pipeline, sequence))
        verdicts[name] = "; ".join(problem.rule for problem in refused) or run(
            kind, options, tensor, pipeline, sequence
        )
    return verdicts


def run(
    kind: str, options: dict[str, Any], tensor: int, pipeline: int, sequence: int, packed: bool | None = None
) -> str:
    """Why a layout's gradients are not those of one process, or nothing.

    Sequence parallelism makes masks of its own: packed rows there, for a family that keeps documents apart at all.
    """
    if packed is None and sequence > 1:
        why = run(kind, options, tensor, pipeline, sequence, packed=True)
        if "data.packing=none" not in why:
            return why
    model = json.dumps({"type": kind, **options})
    case = Case(model, 1, 1, tensor, pipeline, sequence, accumulation=2, packed=bool(packed))
    try:
        ranks = run_ranks(case.world, train, [case], STEPS, timeout_s=90)
        blame: dict[str, float] = {}
        worst = errors(case, [rank[0] for rank in ranks], STEPS, blame)
    except (AssertionError, TimeoutError) as error:
        return str(error).strip().splitlines()[-1][:120]
    except Exception as error:
        return f"alone: {type(error).__name__}: {' '.join(str(error).split())[:90]}"
    what = max(worst, key=lambda key: worst[key])
    if worst[what] < RELATIVE:
        return ""
    name = f" of {max(blame, key=lambda key: blame[key])}" if what == "gradient" else ""
    return f"{what}{name} off by {worst[what]:.0e}"


def document(found: dict[str, dict[str, str]]) -> str:
    """docs/models.md."""
    import importlib.metadata

    version = importlib.metadata.version
    counts = {name: sum(not verdicts[name] for verdicts in found.values()) for name in LAYOUTS}
    lines = [
        "# Model families",
        "",
        "Which of transformers' causal language models run in which layout, as `python tests/distributed/families.py`",
        "found it: it trains a tiny model of each family for two steps on two ranks an axis and compares every",
        f"parameter's gradient before clipping with one process's (relative {RELATIVE:g}, fp32, ZeRO-1,",
        f"accumulation 2; packed rows for sequence parallelism). transformers {version('transformers')}, deepspeed "
        f"{version('deepspeed')}, torch {version('torch')}.",
        "",
        f"{', '.join(f'{name}: {count} families' for name, count in counts.items())}; {len(found)} were looked at. "
        "Data parallelism, with every ZeRO stage, needs no plan.",
        "",
        "| family | " + " | ".join(LAYOUTS) + " |",
        "| --- |" + " --- |" * len(LAYOUTS),
    ]
    some = {kind: verdicts for kind, verdicts in found.items() if not all(verdicts.values())}
    for kind, verdicts in sorted(some.items()):
        lines.append(f"| {kind} | " + " | ".join("no" if verdicts[name] else "yes" for name in LAYOUTS) + " |")
    lines += ["", *encoders(), "", "## Why not", ""]
    for kind, verdicts in sorted(found.items()):
        reasons: dict[str, list[str]] = {}
        for name, why in verdicts.items():
            if why:
                reasons.setdefault(why, []).append(name)
        for why, names in reasons.items():
            which = "" if len(names) == len(LAYOUTS) else f" ({', '.join(names)})"
            lines.append(f"- {kind}{which}: {why}")
    return "\n".join(lines) + "\n"


def encoders() -> list[str]:
    """The table of encoders: the cases of the test that trains them."""
    from test_encoders import HEADS, IMAGES, LAYOUTS, TEXT, UNCUT

    columns = {"tensor": "tensor", "pipeline": "pipeline", "v": "pipeline, DualPipeV",
               "tensor and pipeline": "tensor and pipeline"}  # fmt: skip
    assert tuple(columns) == LAYOUTS
    lines = [
        "## Encoders and heads that classify",
        "",
        f"The same for models with heads of {', '.join(HEADS[:-1])} and {HEADS[-1]}, or of ImageClassification:",
        "`pytest tests/distributed/test_encoders.py`. In the list above, encoders stand as transformers' causal models",
        "of that name; one that sees the token it predicts is refused.",
        "",
        "| family | " + " | ".join(columns.values()) + " |",
        "| --- |" + " --- |" * len(columns),
    ]
    for family in (*TEXT, *IMAGES):
        legal = ["yes" if family not in UNCUT or layout == "tensor" else "no" for layout in columns]
        lines.append(f"| {family} | " + " | ".join(legal) + " |")
    return lines


def main(kinds: list[str]) -> None:
    import conftest  # noqa: F401 - the suite's settings: CPU, one thread

    found = {}
    for kind in kinds or families():
        found[kind] = examine(kind)
        print(kind, found[kind], file=sys.stderr, flush=True)
    if kinds:
        print(document(found))
    else:
        (ROOT / "docs" / "models.md").write_text(document(found))
        listing = json.dumps(dict(sorted(found.items())), indent=1, ensure_ascii=False)
        (ROOT / "recipes" / "models" / "families.json").write_text(listing + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
