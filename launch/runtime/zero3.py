"""Building a model that no rank ever holds whole: ZeRO-3 shards each block as soon as its values are final."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
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


M_MMAP_THRESHOLD = -3
"""Parameter number of glibc's mallopt(3)."""


@contextmanager
def memory_goes_back() -> Iterator[None]:
    """Freed blocks of 64 KiB and more return to the system at once.

    glibc raises its mmap threshold to the size of what is freed (up to 32 MiB), so that whole layers come to lie on the
    heap, and the small shards that stay between them keep all of it resident: four ranks that each hold a quarter of a
    model showed the whole of it. Only while building: in training, page faults would cost more than they save.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 2**16)
    try:
        yield
    finally:
        if mallopt is not None:
            mallopt(M_MMAP_THRESHOLD, 2**25)
