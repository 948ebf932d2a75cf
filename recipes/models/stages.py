"""Pipeline stages of a Hugging Face model: the model itself, with the parts of other stages passed through.

The forward pass of a family is left as it is. Layers of other stages return what they are given, embeddings of other
stages return zeros, and what the previous stage sent takes the place of the first own layer's input: whatever the
family does to its embeddings (scaling, positions, norms) happens on the first stage only. The list of layers keeps its
length, so that per-layer settings (`layer_types[i]`) stay right.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from recipes.models.plans import NoPlanError, find, pipeline_plan, token_table

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PLAIN = (bool, int, float, str, type(None))


class PassThrough(nn.Module):
    """In place of a module of another stage: returns its first argument, with a None behind it in a `pair`."""

    def __init__(self, absent: nn.Module, pair: bool = False):
        super().__init__()
        self._pair = pair
        # Families look at attributes of their layers (`attention_type`) before they call them.
        for name, value in vars(absent).items():
            if isinstance(value, PLAIN) and not name.startswith("_") and name != "training":
                setattr(self, name, value)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = args[0] if args else next(iter(kwargs.values()))
        return (given, None) if self._pair else given


class NoEmbedding(nn.Module):
    """In place of an embedding of another stage: zeros of its shape, `dim` wide."""

    def __init__(self, absent: nn.Module, dim: int | None = None):
        super().__init__()
        weight = next(absent.parameters())
        self.dim, self.dtype = dim or weight.shape[-1], weight.dtype

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        ids = next(value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
        return torch.zeros(*ids.shape[:2], self.dim, dtype=self.dtype, device=ids.device)


class LikeReceived(nn.Module):
    """In place of another stage's embedding of something other than tokens: zeros shaped as what the stage received."""

    def __init__(self, stage: Stage):
        super().__init__()
        self._stage = stage

    def forward(self, given: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        received = self._stage.received
        return given if received is None else torch.zeros_like(received)


def _shell(absent: nn.Module, placeholder: nn.Module) -> nn.Module:
    """`placeholder` with the names of what is inside of `absent`, which families look at (`patches.weight.dtype`)."""
    for name, parameter in absent.named_parameters(recurse=False):
        setattr(placeholder, name, torch.empty(0, dtype=parameter.dtype))
    for name, child in absent.named_children():
        placeholder.add_module(name, _shell(child, PassThrough(child)))
    return placeholder


class Stage:
    """One stage of a pipeline: `model` is the Hugging Face model cut down to a rank's stages (see `cut`), or whole."""

    def __init__(self, model: PreTrainedModel, index: int = 0, count: int = 1):
        self.model = model
        self.first, self.last = index == 0, index == count - 1
        self._received: torch.Tensor | None = None
        self._leaving: torch.Tensor | None = None
        self._elsewhere: dict[str, nn.Module] = {}

    def hook(self, layers: nn.ModuleList, own: range) -> None:
        """Take in what the previous stage sends, and give out what the last own layer returns."""
        if not self.first:
            layers[own.start].register_forward_pre_hook(self._enter, with_kwargs=True)
        if not self.last:
            layers[own[-1]].register_forward_hook(self._leave)

    def pass_through(self, elsewhere: dict[str, nn.Module]) -> None:
        """Placeholders of modules that belong to another stage of this rank, in place during a forward pass only."""
        self._elsewhere = elsewhere

    @contextmanager
    def alone(self) -> Iterator[None]:
        """The model with this stage's parts only; every forward pass of the stage runs in here."""
        theirs = {path: self.model.get_submodule(path) for path in self._elsewhere}
        for path, placeholder in self._elsewhere.items():
            self.model.set_submodule(path, placeholder)
        try:
            yield
        finally:
            for path, module in theirs.items():
                self.model.set_submodule(path, module)

    def _enter(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        if self._received is None:
            return None  # a look at the model alone (recipes.base.Recipe.adopt)
        if args:
            return (self._received, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": self._received}

    @property
    def received(self) -> torch.Tensor | None:
        """What the previous stage sent last."""
        return self._received

    def _leave(self, module: nn.Module, args: tuple, output: Any) -> None:
        self._leaving = output[0] if isinstance(output, tuple) else output

    def receive(self, hidden: torch.Tensor | None) -> None:
        """What the previous stage sent, (B, S, H) of tokens: the input of this stage's next forward pass."""
        self._received = hidden

    def forward(self, **inputs: Any) -> torch.Tensor:
        """The hidden states, (B, S, H) of tokens, behind this stage's last layer; not for the last stage."""
        self.model.base_model(**inputs)
        leaving, self._leaving = self._leaving, None
        assert leaving is not None, "the last layer of the stage was not called"
        return leaving


def cut(model: PreTrainedModel, own: Mapping[int, range], count: int) -> list[Stage]:
    """Cut `model` down, in place, to the stages `own` (number → layers) of `count`, and return these in order.

    A tied last stage keeps the embedding, unused, as the owner of its head's weight: names stay those of the family.
    """
    layers = model.base_model.get_submodule(pipeline_plan(model).layers)
    assert isinstance(layers, nn.ModuleList)
    stages = [Stage(model, index, count) for index in own]
    for stage, mine in zip(stages, own.values(), strict=True):
        stage.hook(layers, mine)
    absent = [_absent(model, stage, mine) for stage, mine in zip(stages, own.values(), strict=True)]
    nowhere = [path for path in absent[0] if all(path in placeholders for placeholders in absent)]
    table, head = token_table(model), model.get_output_embeddings()
    has_head = any(stage.last for stage in stages)
    keeps_table = has_head and is_tied(model)
    for path in nowhere:
        names = [name for name, module in model.get_submodule(path).named_modules() if module is table]
        if keeps_table and table is not None and names:
            vars(table)["forward"] = NoEmbedding(table).forward
            if names == [""]:
                continue
            absent[0][path].set_submodule(names[0], table)
        model.set_submodule(path, absent[0][path])
    if head is not None and not has_head:
        model.all_tied_weights_keys = {}
    for stage, placeholders in zip(stages, absent, strict=True):
        own_kind = {path for path, module in placeholders.items() if isinstance(module, LikeReceived)}
        stage.pass_through(
            {path: placeholders[path] for path in placeholders if path in own_kind or path not in nowhere}
        )
    return stages


def _absent(model: PreTrainedModel, stage: Stage, own: range) -> dict[str, nn.Module]:
    """Path in `model` → placeholder, for every module that `stage` with the layers `own` does without."""
    plan, base = pipeline_plan(model), model.base_model
    names = {id(module): name for name, module in model.named_modules()}
    placeholders: dict[str, nn.Module] = {}
    for path in plan.before if not stage.first else ():
        if (absent := find(base, path)) is not None:
            opens = path == plan.before[0]
            placeholders[names[id(absent)]] = _instead_of_embedding(absent, stage, model.config, opens)
    for number, layer in enumerate(base.get_submodule(plan.layers).children()):
        if number not in own:
            placeholders[names[id(layer)]] = PassThrough(layer, plan.pair)
    if not stage.last:
        # Only the base model is called there; the head's names are for whoever looks for its output embedding.
        children = dict(model.named_children()) if base is not model else {}
        beside = {path: _shell(child, PassThrough(child)) for path, child in children.items() if child is not base}
        placeholders |= beside
        after = [find(base, path) for path in plan.after]
        head = model.get_output_embeddings()
        if head is not None and not any(names[id(head)].startswith(f"{path}.") for path in beside):
            after.append(head)
        placeholders |= {names[id(absent)]: PassThrough(absent) for absent in after if absent is not None}
    return placeholders


def _instead_of_embedding(absent: nn.Module, stage: Stage, config: Any, opens: bool) -> nn.Module:
    """Placeholder of a module before the layers, of which the one that `opens` is given what the model is given."""
    if isinstance(absent, nn.Embedding):
        return NoEmbedding(absent)
    if any(isinstance(module, nn.Embedding) for module in absent.modules()):
        # With what follows it (`embeddings_project` passes through).
        return _shell(absent, NoEmbedding(absent, config.get_text_config().hidden_size))
    # Masks are made of the embedding's length, which images do not tell.
    return _shell(absent, LikeReceived(stage)) if opens else PassThrough(absent)


def is_tied(model: PreTrainedModel) -> bool:
    """Whether the head uses the embedding's weight."""
    config = model.config
    return bool(getattr(config, "tie_word_embeddings", False)) and model.get_output_embeddings() is not None


def balanced_split(costs: Sequence[float], before: float, after: float, count: int) -> list[int]:
    """Layers per stage, so that the costliest stage costs the least; `before` and `after` burden the first and last.

    Exact, by dynamic programming over (stage, layers placed). Of equal splits the one with the most even layers wins.
    Raises NoPlanError when there are fewer layers than stages.
    """
    number = len(costs)
    if count > number:
        raise NoPlanError(f"{number} layers cannot be divided over {count} stages")
    total = [0.0]
    for cost in costs:
        total.append(total[-1] + cost)

    def stage_cost(index: int, start: int, stop: int) -> float:
        return total[stop] - total[start] + before * (index == 0) + after * (index == count - 1)

    # best[placed] = (cost of the worst stage, sum of squared layer counts, layers per stage so far)
    best: dict[int, tuple[float, int, list[int]]] = {0: (0.0, 0, [])}
    for index in range(count):
        following: dict[int, tuple[float, int, list[int]]] = {}
        for placed, (worst, squares, split) in best.items():
            for stop in range(placed + 1, number - (count - 1 - index) + 1):
                here = (max(worst, stage_cost(index, placed, stop)), squares + (stop - placed) ** 2)
                if stop not in following or here < following[stop][:2]:
                    following[stop] = (*here, [*split, stop - placed])
        best = following
    return best[number][2]


def ranges(split: Sequence[int]) -> list[range]:
    """Layer numbers of each stage, from the numbers of layers per stage."""
    starts = [sum(split[:index]) for index in range(len(split))]
    return [range(start, start + size) for start, size in zip(starts, split, strict=True)]
