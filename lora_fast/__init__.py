"""LoRA fine-tuning on NVIDIA GPUs: fused Triton kernels behind thin torch modules. Start with ``inject_`` or ``fuse_``."""

from . import functional
from .backend import set_backend
from .checks import ArgumentError, BackendError
from .linear import LoRALinear

__version__ = "0.1.0"
__all__ = ["ArgumentError", "BackendError", "LoRALinear", "functional", "set_backend"]
