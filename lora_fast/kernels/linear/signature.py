"""What the plans of single layers and of groups share: the layout of a call's tensors, the settings of the process, and
the dictionary of plans."""

from __future__ import annotations

import math
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from .. import device, tuned
from ..launch import contiguous_rows, keep_plan, tf32, thin_dtype
from . import strategies
from .cublas import CublasGradA, CublasGradSB
from .gemm import gemm_class
from .grads import GradA, GradSB

plans: dict[tuple, Any] = {}  # by signature: the plan of the call that made the key


def settings(x: Tensor) -> tuple:
    """Returns the settings of the process on which a plan depends: whether float32 products may use TF32, the changes
    of the measured choices, and torch's carve-out."""
    return tf32(x), tuned.changes(), device.carveout()


def keep(key: tuple, plan, x: Tensor):
    """Keeps a plan for a key whose last item is the settings, unless another thread has changed them since. A part of
    the plan would then be made for the old ones and another part for the new ones."""
    return keep_plan(plans, key, plan) if key[-1] == settings(x) else plan


_any_autocast = torch._C._is_any_autocast_enabled


def in_autocast(x: Tensor) -> bool:
    """Returns whether autocast would cast the operands of torch's products. It is then disabled, because forward's
    caller has already cast them, and backward may run in another autocast region than forward."""
    return _any_autocast() and torch.is_autocast_enabled(x.device.type)


def empty_forward(x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, rounded: bool) -> tuple:
    """Returns y and S where x or the weight has no elements."""
    y = x.new_zeros((*x.shape[:-1], len(weight)))
    y = y if bias is None else y + bias
    return y, x.new_zeros((math.prod(x.shape[:-1]), len(lora_A)), dtype=thin_dtype(x, lora_A, rounded))


def wider(lora_A: Tensor, lora_B: Tensor) -> torch.dtype:
    """Returns the wider dtype of both factors, from which the way of a call is chosen. They usually have one dtype."""
    return torch.promote_types(lora_A.dtype, lora_B.dtype)


def gemm_of(way: strategies.Way, lora_A: Tensor, lora_B: Tensor) -> type:
    """Returns the GEMM's class. "gluon" needs both factors in one dtype, otherwise "fused" is used."""
    mixed = lora_A.dtype is not lora_B.dtype
    return gemm_class("fused" if mixed and way.gemm == "gluon" else way.gemm)


def grad_s_b_by(way: strategies.Way, dy, s, lora_B, needs: tuple[bool, bool], rounded: bool):
    """Returns what computes dS and db by this way."""
    return (CublasGradSB if way.thin == "cublas" else GradSB)(dy, s, lora_B, needs, rounded)


def grad_a_by(way: strategies.Way, x, ds_dtype: torch.dtype, lora_A, dropout: bool):
    """Returns what computes da by this way. cuBLAS applies no mask and multiplies matrices of one dtype only."""
    by_cublas = way.thin == "cublas" and not dropout and ds_dtype is x.dtype
    return CublasGradA() if by_cublas else GradA(x, ds_dtype, lora_A, dropout)


def flat(tensor: Tensor) -> Tensor:
    """Returns the tensor as (n_tokens, d) with contiguous rows."""
    return contiguous_rows(tensor if tensor.dim() == 2 else tensor.reshape(-1, tensor.shape[-1]))


def share_memory(arguments: tuple, laid_out: tuple) -> bool:
    """Returns whether laying out copied nothing. The arguments can then be passed as they are, because kernels use only
    their addresses and the strides in the plan."""
    return all(a is b or a.data_ptr() == b.data_ptr() for a, b in zip(arguments, laid_out, strict=True))


@contextmanager
def undisturbed(x: Tensor):
    """Makes x's device the current one, and disables autocast, inside the context."""
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext(), torch.autocast(x.device.type, enabled=False):
        yield
