"""Hugging Face models from scratch or from their safetensors, block by block, with the same values in every layout."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel, initialization

from conf.errors import Problem, RequestError
from conf.weight_files import find_weights
from recipes import hub
from recipes.models.loading import Differences, Place, compare, fill, listed, refuse_lacking
from recipes.models.writing import check_writing

CONSTRUCTED_ELEMENTS = 2**16
"""Largest parameter whose value from the constructor is remembered: vectors and scalars."""
Divide = Callable[[PreTrainedModel], None]
"""Called with the model on the meta device; may cut it down to a pipeline stage and mark what is to be sharded."""


def blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The units a model is built in: elements of its layer lists whole, everything else module by module.

    A family may initialise a layer's weights from the layer (GPT-2 scales `c_proj` there), so a layer stays one unit.
    Children come before their parents.
    """

    def walk(prefix: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        for name, child in module.named_children():
            path = f"{prefix}.{name}" if prefix else name
            if isinstance(module, nn.ModuleList):
                yield path, child
            else:
                yield from walk(path, child)
        if not isinstance(module, nn.ModuleList):
            yield prefix, module

    yield from walk("", model)


def _seed(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "little") >> 1


def _materialise(module: nn.Module, device: torch.device, recurse: bool) -> None:
    """Give the meta parameters of `module` memory; tied parameters stay one object within the call."""
    for child in module.modules() if recurse else [module]:
        for name, parameter in child.named_parameters(recurse=False):
            if parameter.is_meta:
                # Not a number: whatever the family does not initialise must not pass for a value.
                empty = torch.full_like(parameter, float("nan"), device=device)
                fresh = nn.Parameter(empty, requires_grad=parameter.requires_grad)
                fresh.__dict__.update(parameter.__dict__)
                fresh.__dict__["_is_hf_initialized"] = False
                setattr(child, name, fresh)


def on_meta(hf_class: Any, config: PretrainedConfig, *, dtype: torch.dtype, attention: str | None) -> PreTrainedModel:
    """A model whose parameters have shapes and no memory.

    Its buffers (rotary frequencies, causal masks) are computed for real: small, and not every family can redo them.
    """
    with _parameters_on_meta():
        return _learning_all_tokens(hub.new_model(hf_class, config, dtype=dtype, attn_implementation=attention))


def _learning_all_tokens(model: PreTrainedModel) -> PreTrainedModel:
    """No row of the token embeddings begins as zero or stays without gradient, as torch has it for `padding_idx`.

    Padding is often the end of text as well, which separates and ends what a model reads; where it is only padding it
    is hidden by the mask and has no gradient anyway.
    """
    rows = getattr(model.config.get_text_config(), "vocab_size", None)
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module.num_embeddings == rows:
            module.padding_idx = None
    return model


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Every parameter registered inside goes to the meta device.

    Small ones that a family makes with their values (`nn.Parameter(torch.zeros(n))`) and never touches again in its
    `_init_weights` remember them, as `constructed`. torch's own modules initialise by calls, not here.
    """
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(module, name, parameter)
        if parameter is None or parameter.is_meta:
            return
        fresh = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
        fresh.__dict__.update(parameter.__dict__)
        if parameter.numel() <= CONSTRUCTED_ELEMENTS and not type(module).__module__.startswith("torch.nn"):
            fresh.__dict__["constructed"] = parameter.detach().clone()
        module._parameters[name] = fresh

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def from_scratch(
    hf_class: Any,
    config: PretrainedConfig,
    *,
    seed: int,
    dtype: torch.dtype,
    device: torch.device,
    attention: str | None,
    divide: Divide | None = None,
    place: Place | None = None,
) -> PreTrainedModel:
    """A new model with the family's own initialisation.

    Built on the meta device and filled block by block; each block draws from a generator seeded by (seed, its name),
    so the values depend neither on the layout nor on the order. `divide` is called before anything is filled, `place`
    when the values of a block are final; it may shard the block: no more than one whole block is ever in memory, and
    what a family initialises from further up (T5's embedding).
    """
    model = on_meta(hf_class, config, dtype=dtype, attention=attention)
    tied = set(model.all_tied_weights_keys)
    if divide is not None:
        divide(model)
    above = _initialised_above(model) if place is not None else {}
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.no_grad():
        for name, block in blocks(model):
            whole = _is_layer(name)
            own = {f"{name}.{key}" if name else key for key, _ in block.named_parameters(recurse=whole)}
            if own and own <= set(tied):
                continue  # a tied head: tie_weights() below points it at the embedding
            _initialise(model, name, block, seed, device, above, place)
    model.tie_weights(recompute_mapping=False)  # a stage without a head has nothing to tie
    left = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if left:
        raise RuntimeError(f"{type(model).__name__}: parameters without memory after building: {left[:5]}")
    return _on_device(model, device)


def _initialise(
    model: PreTrainedModel,
    name: str,
    block: nn.Module,
    seed: int,
    device: torch.device,
    above: dict[str, str],
    place: Place | None,
) -> None:
    """Values for those parameters of a block that have no memory yet, and for those below that it sets (`above`)."""
    whole = _is_layer(name)
    fresh = [key for key, parameter in block.named_parameters(prefix=name, recurse=whole) if parameter.is_meta]
    _materialise(block, device, recurse=whole)
    torch.manual_seed(_seed(seed, name))
    for module in reversed(list(block.modules())) if whole else [block]:
        module.__dict__["_is_hf_initialized"] = False
        model._initialize_weights(module)
    _take_constructed(model, name, block, whole)
    if place is not None:
        final = [key for key in fresh if key not in above] + [key for key in above if above[key] == name]
        place([model.get_parameter(key) for key in final])


def _is_layer(name: str) -> bool:
    """Whether a block is an element of a list of layers, and so built whole."""
    return name.rpartition(".")[2].isdigit()


def _initialised_above(model: PreTrainedModel) -> dict[str, str]:
    """Name of a parameter → the last block further up whose initialisation sets it; of those that one does.

    Found by trying, while nothing has memory: torch counts the writes to each tensor, but for those that its
    `trunc_normal_` (2.13) does not make on the meta device.
    """
    found, drawn = {}, set[int]()
    initialise: Any = model._init_weights
    parameters = dict(model.named_parameters())
    truncated: Any = initialization.TORCH_INIT_FUNCTIONS["trunc_normal_"]

    def noted(tensor: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:
        drawn.add(id(tensor))
        return truncated(tensor, *rest, **options)

    initialization.TORCH_INIT_FUNCTIONS["trunc_normal_"] = noted
    try:
        for name, block in blocks(model):
            if _is_layer(name) or next(block.children(), None) is None:
                continue
            own = {id(parameter) for parameter in block.parameters(recurse=False)}
            before = {key: parameter._version for key, parameter in parameters.items()}
            drawn.clear()
            with torch.no_grad():
                initialise(block)
            for key, parameter in parameters.items():
                if id(parameter) not in own and (id(parameter) in drawn or parameter._version != before[key]):
                    found[key] = name
    finally:
        initialization.TORCH_INIT_FUNCTIONS["trunc_normal_"] = truncated
    return found


def _take_constructed(model: PreTrainedModel, block: str, module: nn.Module, recurse: bool) -> None:
    """Values that the family gives in its constructors. Raises RequestError where it gives none at all."""
    for name, parameter in module.named_parameters(recurse=recurse):
        if not parameter.isnan().any():
            continue
        value = vars(parameter).get("constructed")
        if value is None:
            rule = (
                f"{model.config.model_type} does not initialise {block}.{name}: it cannot be trained from scratch here"
            )
            raise RequestError(
                Problem("model.type", model.config.model_type, rule, "model.path=… (pretrained weights)")
            )
        parameter.copy_(value)


def from_pretrained(
    hf_class: Any,
    folder: Path,
    *,
    dtype: torch.dtype,
    device: torch.device,
    attention: str | None,
    divide: Divide | None = None,
    place: Place | None = None,
    config: PretrainedConfig | None = None,
    new_head_seed: int | None = None,
    variant: str | None = None,
) -> PreTrainedModel:
    """A model with the weights of `folder` (safetensors; never pickles of strangers, never their code).

    It is filled layer by layer, from the tensors that this rank's part needs: no more than one whole layer is ever in
    memory beside what `place` keeps. With `new_head_seed` what stands outside of the base model may be missing there
    and is then new, by the family's own initialisation. `config`, when given, goes instead of the folder's: the head
    and the dropout are the request's. variant: as in `find_weights`. Raises RequestError when other weights are
    missing.
    """
    config = config or hub.config(folder)
    config.use_cache = False
    model = on_meta(hf_class, config, dtype=dtype, attention=attention)
    if (folder / "generation_config.json").exists():
        model.generation_config = hub.generation_config(folder)
    base = _base_prefix(model)
    if divide is not None:
        divide(model)
    above = _initialised_above(model) if new_head_seed is not None else {}
    mismatched = fill(model, find_weights(folder, variant).files, device, place)
    model.tie_weights(recompute_mapping=False)
    lacking = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    new = [] if new_head_seed is None else [name for name in lacking if _in_head(base, name)]
    left = [name for name in lacking if name not in new]
    refuse_lacking(folder, [f"{name} in this shape" if name in mismatched else name for name in left])
    if new_head_seed is not None:
        above = {name: block for name, block in above.items() if name in new}
        _initialise_head(model, new, new_head_seed, device, above, place)
    return _on_device(model, device)


def _on_device(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """Move the buffers to where the parameters were made.

    They are computed on the host (`on_meta`), and deepspeed 0.19.8 moves nothing of a model whose parameters ZeRO-3
    has sharded: the positions of BERT or the running means of a convolutional network would stay behind.
    """
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device)
    return model


def check_weights(model: PreTrainedModel, folder: Path, variant: str | None, new_head: bool) -> list[str]:
    """What is to be said of a folder's weights for `model` (whole, on the meta device), before anything is read.

    The same in every layout. Raises RequestError where something would be made up.
    """
    files = find_weights(folder, variant)
    found: Differences = compare(model, files.files)
    base = _base_prefix(model)
    new = {name for name in (*found.missing, *found.mismatched) if new_head and _in_head(base, name)}
    lacking = [name for name in found.lacking if name.partition(" ")[0] not in new]
    refuse_lacking(folder, lacking, found.unexpected)
    check_writing(folder, model.config)
    said = [f"weights of {folder}: {', '.join(files.others)} not read"] if files.others else []
    if new:
        said.append(f"new in the model, its weights lack it: {listed(sorted(new))}")
    if found.unexpected:
        said.append(f"in its weights, without a place in the model: {listed(found.unexpected)}")
    return said


def _base_prefix(model: PreTrainedModel) -> str:
    """Where a model's base model lies in it; its largest part where the class names none that is there (CLIP)."""
    if hasattr(model, model.base_model_prefix):
        return model.base_model_prefix
    sizes = {name: sum(p.numel() for p in child.parameters()) for name, child in model.named_children()}
    return max(sizes, key=lambda name: sizes[name])


def _in_head(base: str, name: str) -> bool:
    """Whether a parameter stands outside of the base model, or is of its pooler."""
    return not name.startswith(f"{base}.") or "pooler" in name


def _initialise_head(
    model: PreTrainedModel,
    names: list[str],
    seed: int,
    device: torch.device,
    above: dict[str, str],
    place: Place | None,
) -> None:
    """New values for parameters that the weights lacked, as if they had been built from scratch; no others change."""
    for name, parameter in model.named_parameters():
        parameter.__dict__["_is_hf_initialized"] = name not in names  # what transformers' initialisation passes over
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.no_grad():
        for name, block in blocks(model):
            own = [key for key, _ in block.named_parameters(prefix=name, recurse=_is_layer(name))]
            if name in above.values() or any(key in names for key in own):
                _initialise(model, name, block, seed, device, above, place)


def checkpoint_layers(model: PreTrainedModel, every: int) -> None:
    """Recompute the activations of every n-th layer in backward (0: none), with the model's own layer checkpointing."""
    if not every:
        return
    from transformers.modeling_layers import GradientCheckpointingLayer

    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    layers = [
        (name, module) for name, module in model.named_modules() if isinstance(module, GradientCheckpointingLayer)
    ]
    for index, (name, layer) in enumerate(layers):
        number = name.rpartition(".")[2]  # a pipeline stage does not begin at the first layer
        layer.gradient_checkpointing = (int(number) if number.isdigit() else index) % every == 0


def compile_layers(model: PreTrainedModel) -> None:
    """torch.compile each layer in place: the layers share one compiled graph, and hooks between them stay intact."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.compile()
