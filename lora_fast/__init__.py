"""LoRA fine-tuning on NVIDIA GPUs: fused Triton kernels behind thin torch modules.

Start with ``inject_`` for a plain model or ``fuse_`` for a PEFT model. ``lora_fast.hf``, for transformers' Trainer, is
imported at its first use.
"""

from importlib import import_module

from . import functional, methods, metrics, optim
from .backend import set_backend
from .checkpoints import pretrained  # noqa: F401  (registers what models with adapters save)
from .checkpoints.adapter import load_adapter, save_adapter
from .checks import ArgumentError, BackendError, CheckpointError, MissingPackageError
from .layers.dora_linear import DoRALinear
from .layers.lora import LoRALinear
from .layers.nb_lora import NBLoRALinear
from .layers.sing_lora import SingLoRALinear, count_steps_
from .ops import flop_formulas, inductor  # noqa: F401  (give torch's counter and compiler what the ops are)
from .surgery.change_report import Report
from .surgery.configs import LoRAConfig, NBLoRAConfig, SingLoRAConfig
from .surgery.dequantize import dequantize_
from .surgery.disable import disable_adapters
from .surgery.fuse import fuse_, unfuse_
from .surgery.groups import groups
from .surgery.inject import inject_
from .surgery.merge import merge_, unmerge_
from .surgery.unload import unload_

__version__ = "0.1.0"
__all__ = [
    "ArgumentError",
    "BackendError",
    "CheckpointError",
    "DoRALinear",
    "LoRAConfig",
    "LoRALinear",
    "MissingPackageError",
    "NBLoRAConfig",
    "NBLoRALinear",
    "Report",
    "SingLoRAConfig",
    "SingLoRALinear",
    "count_steps_",
    "dequantize_",
    "disable_adapters",
    "functional",
    "fuse_",
    "groups",
    "inject_",
    "load_adapter",
    "merge_",
    "methods",
    "metrics",
    "optim",
    "save_adapter",
    "set_backend",
    "unfuse_",
    "unload_",
    "unmerge_",
]


def __getattr__(name: str):
    if name == "hf":  # imports transformers, which takes seconds
        return import_module(".hf", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
