"""What forked ranks and commands find imported: all that each of them would import by itself.

Only imports: a process that has computed has threads, and its children would wait for them.
"""

from __future__ import annotations

import importlib
import pkgutil

LIBRARIES = (
    "torch", "deepspeed", "transformers", "datasets", "tokenizers.implementations", "pytest", "hypothesis",
    "numpy.testing",
    "safetensors.torch", "gguf", "sentencepiece", "PIL.Image", "pyarrow.parquet", "tensorboard.compat.proto.event_pb2",
    "torch.utils.tensorboard", "matplotlib.pyplot", "sacrebleu", "seqeval.metrics", "sklearn.datasets",
    "torchmetrics.functional.classification", "torchmetrics.functional.regression", "torchmetrics.text",
    "rich.progress", "rich.table", "hydra._internal.config_loader_impl", "hydra.core.plugins",
    "ipykernel.kernelapp", "ipykernel.ipkernel", "IPython.display",
    # What torch and deepspeed load when they are first used.
    "torch._dynamo", "functorch.compile", "torch._inductor.lowering", "torch._export", "torch.export",
    "deepspeed.module_inject.auto_ep_layer", "deepspeed.ops.triton_ops", "deepspeed.utils.pin_memory",
    "deepspeed.runtime.zero.muon.muon_optimizer", "deepspeed.runtime.superoffload.superoffload_stage3",
    "deepspeed.runtime.pipe.engine", "deepspeed.checkpoint.ds_to_universal",
    "transformers.generation", "transformers.generation.utils", "transformers.core_model_loading",
    "transformers.integrations.deepspeed", "transformers.modeling_gguf_pytorch_utils", "transformers.pipelines",
)  # fmt: skip
FAMILIES = (
    "llama", "gpt2", "qwen2", "qwen3", "mixtral", "bert", "roberta", "xlm_roberta", "camembert", "electra",
    "distilbert", "modernbert", "deberta", "deberta_v2", "albert", "mpnet", "vit", "convnext", "bart", "t5", "marian",
    "auto",
)  # fmt: skip
ROOMS = ("conf", "recipes", "launch")


def load() -> None:
    """Import them. A module that a version of a library does not have is left out: it is imported when it is used."""
    families = [f"transformers.models.{name}.modeling_{name}" for name in FAMILIES]
    for name in (*LIBRARIES, *families):
        try:
            importlib.import_module(name)
        except ImportError:
            continue
    for room in ROOMS:
        package = importlib.import_module(room)
        for found in pkgutil.walk_packages(package.__path__, f"{room}."):
            importlib.import_module(found.name)


def know_the_processor() -> None:
    """The engine asks py-cpuinfo for it with each offloaded optimizer, which takes a second and a process each time."""
    import cpuinfo

    known = cpuinfo.get_cpu_info()
    cpuinfo.get_cpu_info = lambda: known


load()
know_the_processor()
