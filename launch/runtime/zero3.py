"""Building a model that no rank ever holds whole: ZeRO-3 shards each block as soon as its values are final."""

from __future__ import annotations

from typing import Any

from torch import nn

from recipes.models.build import Place


def sharder(ds_config: dict[str, Any]) -> Place:
    """A `place` callback for `recipes.models.build.from_scratch`: shards a block's parameters over all ranks."""
    import deepspeed

    # Not entered as a context: that would shard each submodule before the family has initialised it.
    init = deepspeed.zero.Init(config_dict_or_path=ds_config)

    def place(parameters: list[nn.Parameter]) -> None:
        init._convert_to_zero_parameters(parameters)

    return place


def shard_while_loading(ds_config: dict[str, Any]) -> Any:
    """Make `from_pretrained` shard while it reads. The returned object must be kept alive until the model is loaded:
    transformers holds it by a weak reference."""
    from transformers.integrations import HfDeepSpeedConfig

    return HfDeepSpeedConfig(ds_config)
