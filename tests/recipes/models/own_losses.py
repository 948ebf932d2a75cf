"""What the forward passes of transformers add to the loss, by family and key of its configuration.

python tests/recipes/models/own_losses.py           # recipes/models/own_losses.json and docs/losses.md, ten minutes
python tests/recipes/models/own_losses.py mixtral   # the routers' loss of these families, printed

Read from the text of the classes that tasks train: what is assigned to a loss, under which conditions, from which
attributes of the configuration. Whether the routers' loss comes out right is tried: gradients of a tiny model in
layouts of two ranks an axis, as for docs/models.md.
"""

# ruff: noqa: E402 - started as a script, it first puts the suite on sys.path
from __future__ import annotations

import ast
import json
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
sys.path[:0] = [
    path for path in (str(ROOT), str(ROOT / "tests"), str(ROOT / "tests/distributed")) if path not in sys.path
]

import families as models
import transformers
from transformers import CONFIG_MAPPING
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import model_type_to_module_name

from recipes.models.own_losses import AXES, SWITCH, Family, families
from recipes.models.router_loss import COEFFICIENTS

MODELS = Path(transformers.__file__).parent / "models"
HEADS = (
    "CAUSAL_LM", "SEQUENCE_CLASSIFICATION", "TOKEN_CLASSIFICATION", "QUESTION_ANSWERING", "IMAGE_CLASSIFICATION",
    "SEQ_TO_SEQ_CAUSAL_LM",
)  # fmt: skip
"""The mappings of transformers that tasks take their models from."""
NO_TERMS = re.compile(
    r"(.*\.)?(vocab_size|tgt_vocab_size|decoder_vocab_size|num_labels|num_qa_labels|problem_type|pad_token_id"
    r"|num_experts|num_local_experts|num_experts_per_tok|moe_num_experts|moe_top_k|num_codebooks|ngram"
    r"|encoder_sparse_step|decoder_sparse_step|get_text_config|use_return_dict)"
)
"""Attributes that a loss is computed with and that say how large something is, or of which kind: no terms of it."""
NAMED = re.compile(rf".*(loss|mtp|nextn|smoothing).*|{SWITCH}")
"""What an attribute of a loss is called."""


def kinds() -> dict[str, list[str]]:
    """`model_type` → names of the classes that tasks train."""
    found: dict[str, list[str]] = {}
    for head in HEADS:
        for kind, name in getattr(modeling_auto, f"MODEL_FOR_{head}_MAPPING_NAMES").items():
            if kind in CONFIG_MAPPING:
                found.setdefault(kind, []).extend(name if isinstance(name, tuple) else (name,))
    return {kind: sorted(set(names)) for kind, names in sorted(found.items())}


@cache
def _source(folder: Path) -> str:
    return "\n".join(file.read_text() for file in sorted(folder.glob("modeling_*.py")))


def _class(kind: str, name: str) -> ast.ClassDef | None:
    """A class of a family as its text has it; None where transformers makes it without one."""
    text = re.search(
        rf"^class {name}\(.*?(?=^\S)", _source(MODELS / model_type_to_module_name(kind)) + "\n#", re.M | re.S
    )
    return ast.parse(text.group(0)).body[0] if text else None  # type: ignore[return-value]


def _attributes(node: ast.AST) -> set[str]:
    """Dotted paths from `self` or `config` in an expression, the longest of each."""
    paths = {ast.unparse(part) for part in ast.walk(node) if isinstance(part, ast.Attribute)}
    paths = {path for path in paths if path.startswith(("self.", "config."))}
    return {path for path in paths if not any(other.startswith(f"{path}.") for other in paths)}


def _of_config(path: str, given: dict[str, set[str]]) -> set[str]:
    """Attributes of the configuration behind a path, itself or what the constructor made it of."""
    own = {path} | given.get(path, set())
    return {one.split("config.", 1)[1] for one in own if re.match(r"(self\.)?config\.", one)}


def _constructed(made: ast.ClassDef) -> dict[str, set[str]]:
    """`self.x` → what the constructor assigns to it."""
    found: dict[str, set[str]] = {}
    for method in made.body:
        for node in ast.walk(method) if isinstance(method, ast.FunctionDef) and method.name == "__init__" else ():
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Attribute):
                found.setdefault(ast.unparse(node.targets[0]), set()).update(_attributes(node.value))
    return found


Condition = tuple[ast.expr, ...]


def _losses(body: list[ast.stmt], conditions: Condition = ()) -> Iterator[tuple[ast.expr, Condition]]:
    """(what is assigned, the conditions it stands under) of every statement about a loss.

    Where a loss is made by a call of a method or in several steps, the conditions in between decide as well.
    """
    for node in body:
        if isinstance(node, ast.If):
            yield from _losses(node.body, (*conditions, node.test))
            yield from _losses(node.orelse, (*conditions, node.test))
            if any(isinstance(inner, ast.Break | ast.Continue) for inner in node.body):
                yield node.test, conditions
        elif isinstance(node, ast.For | ast.While | ast.With | ast.Try):
            yield from _losses(node.body, conditions)
        elif isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign) and node.value is not None:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any("loss" in ast.unparse(target) for target in targets):
                yield node.value, conditions


def read_by(kind: str, name: str) -> dict[str, str | None]:
    """Attribute of the configuration that the loss of a class depends on → the attribute that has it count."""
    made = _class(kind, name)
    if made is None:
        return {}
    given, found = _constructed(made), dict[str, str | None]()
    for method in made.body:
        if not isinstance(method, ast.FunctionDef) or method.name == "__init__" or "loss" not in ast.unparse(method):
            continue
        for value, conditions in _losses(method.body):
            switched = any(
                isinstance(node, ast.Name) and node.id == SWITCH for one in conditions for node in ast.walk(one)
            )
            for path in set().union(*map(_attributes, (value, *conditions))):
                for key in _of_config(path, given):
                    if not NO_TERMS.fullmatch(key):
                        found[key] = SWITCH if switched and found.get(key, SWITCH) else None
    return found


def named(kind: str) -> list[str]:
    """Attributes of a family's configuration that are called as if they were of a loss."""
    try:
        config = CONFIG_MAPPING[kind]()
    except Exception:  # some families leave a default to us that they cannot do without
        return []
    return sorted(key for key in {*config.attribute_map, *vars(config)} if NAMED.fullmatch(key))


def scan() -> dict[str, Family]:
    """All families, without `router`."""
    rows: dict[str, Family] = {}
    for kind, names in kinds().items():
        row: Family = {}
        for name in names:
            for key, switch in read_by(kind, name).items():
                entry = row.setdefault("read", {}).setdefault(key, {"heads": [], "switch": switch})
                entry["heads"].append(name)
        if own := named(kind):
            row["named"] = own
        if row:
            rows[kind] = row
    return rows


def with_routers(row: Family) -> str | None:
    """The coefficient of a family's routers' loss, if its language model has one that can count here."""
    read = row.get("read", {})
    switched = (key for key in COEFFICIENTS if key in read and read[key]["switch"] == SWITCH)
    return next((key for key in switched if any(head.endswith("CausalLM") for head in read[key]["heads"])), None)


def examine(kind: str, key: str) -> dict[str, str]:
    """Axis → "" where a family's gradients with the routers' loss are one process's, else why not."""
    layouts = {"alone": (1, 1, 1), **models.LAYOUTS}
    try:
        options: dict[str, Any] = {**models.tiny_options(kind), SWITCH: True, key: 0.5}
        network = models.build_on_meta(kind, options)
    except Exception as error:
        return dict.fromkeys(AXES, f"cannot be built tiny: {' '.join(str(error).split())[:60] or type(error).__name__}")
    verdicts = {}
    for axis in AXES:
        refused = models.structural(network, models.ParallelConfig(*layouts[axis]))
        verdicts[axis] = "; ".join(problem.rule for problem in refused) or models.run(kind, options, *layouts[axis])
        if axis == "alone" and verdicts[axis]:
            return dict.fromkeys(AXES, verdicts[axis])
    return verdicts


def document(rows: dict[str, Family]) -> str:
    """docs/losses.md."""
    lines = [HEADER.format(version=transformers.__version__)]
    for kind, row in rows.items():
        for key, found in row.get("read", {}).items():
            heads, why = ", ".join(found["heads"]), "refused"
            verdicts = row.get("router", {})
            if found["switch"] and key in COEFFICIENTS and verdicts and not verdicts["alone"]:
                not_there = [axis for axis in AXES if verdicts[axis]]
                why = "counts" + (f", but not with {', '.join(not_there)}" if not_there else "")
            switch = f" with `{found['switch']}`" if found["switch"] else ""
            lines.append(f"| {kind} | `{key}`{switch} | {heads} | {why} |")
    return "\n".join(lines) + "\n"


HEADER = """# Losses that models bring along

The loss that is minimised is cross-entropy (or a task's own), computed here, so that every layout has the same number.
What the forward pass of a family in transformers {version} adds to its own loss is in this table, written by
`python tests/recipes/models/own_losses.py`. Each of these attributes counts or, set so that it would count in
transformers, is refused before the start with its name. So are attributes that are only called like one and that no
forward pass reads (`mtp_loss_scaling_factor`, `num_nextn_predict_layers`, `router_aux_loss_coef` of Llama 4, or any of
them for a head that does not have it), where `model.config` sets them: transformers trains no multi-token prediction.

## The routers' load-balancing loss

`model.config.output_router_logits=true` adds `router_aux_loss_coef` times the load-balancing loss of a mixture's
routers (Switch Transformer, eq. 4-6), for `task: causal_lm`; in a folder of weights, its `config.json` says so. In
`metrics.jsonl` it has a column of its own, `router_aux_loss` (without the coefficient; `loss` stays the cross-entropy),
for steps and evaluations.

transformers computes it over all tokens of one forward pass. It is a product of two means over these tokens (how often
an expert is chosen, how probable it is), so its value depends on which rows share a forward pass: on micro-batch,
accumulation and ranks. Here it is transformers' own function of **one row** (a sequence of `data.seq_length`, with all
documents that are packed into it, over all layers), padding left out, and rows are averaged by their supervised
targets, as in the rest of the loss:

    minimised = Σ over rows (cross-entropy of its targets + coefficient · its targets · its balance) / all targets

- With one row a micro-batch this is what transformers returns. With more it is not: transformers then lets an imbalance
  of one row be made up for by another, so that its value is a little smaller, and asks for less of each row.
- Statistics of the whole global batch would not depend on the layout either, but the gradient of its first micro-batch
  depends on the choices in its last: all forward passes would be needed twice.
- Short unpacked rows are asked for more than they can do (8 tokens cannot visit 64 experts): pack them
  (`data.packing=documents`), or take a small coefficient.
- `train.compile` is refused with it.

## All of them

| family | attribute | heads | here |
| --- | --- | --- | --- |"""


def main(argv: list[str]) -> None:
    rows = scan()
    known = families() if (ROOT / "recipes/models/own_losses.json").exists() else {}
    for kind, row in rows.items():
        if key := with_routers(row):
            if kind in argv or not argv:
                row["router"] = examine(kind, key)
                print(kind, row["router"], flush=True)
            elif "router" in known.get(kind, {}):
                row["router"] = known[kind]["router"]
    text = json.dumps(rows, indent=1, sort_keys=True) + "\n"
    (ROOT / "recipes/models/own_losses.json").write_text(text)
    (ROOT / "docs/losses.md").write_text(document(json.loads(text)))


if __name__ == "__main__":
    main(sys.argv[1:])
