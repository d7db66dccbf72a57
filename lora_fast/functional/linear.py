"""The public function of a linear layer with its LoRA adapter: checks the arguments, then runs the op."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .. import backend, checks
from ..ops import linear as linear_op
from ..ops import seeds

# Looked up once, because attribute accesses cost host time in every layer's call. Function.apply is a Python method for
# functorch (vmap, grad); without functorch it only calls the method that it overrides.
_any_autocast, _traced, _functorch = (
    torch._C._is_any_autocast_enabled,
    torch.compiler.is_compiling,
    torch._C._are_functorch_transforms_active,
)
_apply = super(torch.autograd.Function, linear_op.LoRALinearFunction).apply


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout_p: float = 0.0,
    seed: int | None = None,
) -> Tensor:
    """A frozen linear layer with its LoRA adapter (Hu et al., arXiv 2106.09685, eq. 3) as one differentiable op:
    ``y = x Wᵀ + bias + scaling · dropout(x) aᵀ bᵀ``.

    Only x and S = dropout(x) aᵀ are saved for backward. Under autocast x, weight and bias are cast to the autocast
    dtype, as in ``nn.Linear``. Products accumulate in float32 and are rounded once per result.

    Args:
        x: (..., d_in), float16, bfloat16, float32 or (torch backend) float64; any strides.
        weight: (d_out, d_in) in x's dtype; frozen (``requires_grad=False``).
        bias: (d_out,) in x's dtype, or None.
        lora_A: (r, d_in), r from 1 to 256, any floating dtype; float32 keeps its precision outside autocast.
        lora_B: (d_out, r), likewise.
        scaling: alpha / r, or alpha / sqrt(r) for rsLoRA.
        dropout_p: probability that an element of x is dropped on the way to the adapter, in steps of 1/65536.
        seed: seed of the dropout mask, from 0 to 2⁶²-1. None draws from the default generator of x's device, as
            nn.Dropout does, so that ``torch.manual_seed`` and activation checkpointing reproduce the mask.

    Returns:
        y (..., d_out) in x's dtype (the autocast dtype under autocast). Each gradient has its argument's dtype.

    Raises:
        ArgumentError: shapes, dtypes, devices or values that do not fit.
        BackendError: the Triton backend is chosen and cannot run here.
    """
    autocast = _any_autocast() and is_autocast_on(x.device.type) and x.dtype != torch.float64
    checks.lora_linear(x, weight, bias, lora_A, lora_B, scaling, dropout_p, autocast)
    if autocast:
        x = x.to(torch.get_autocast_dtype(x.device.type))
    traced = _traced()
    mask_seed = _mask_seed(x, dropout_p, seed, traced) if dropout_p > 0.0 else None
    if traced:
        triton = backend.uses_triton(x)
        if weight.dtype is not x.dtype:
            # In a region of its own the compiler casts again in backward, and in a checkpointed region once for all
            # that runs again there. It would keep the copy of a plain cast from forward to backward.
            weight = checkpoint(weight.to, x.dtype, use_reentrant=False, preserve_rng_state=False)
        return linear_op.lora_linear_op(
            x, weight, bias, lora_A, lora_B, scaling, dropout_p, mask_seed, autocast, triton
        )[0]
    apply = linear_op.LoRALinearFunction.apply if _functorch() else _apply
    return apply(x, weight, bias, lora_A, lora_B, scaling, dropout_p, mask_seed, autocast)


def is_autocast_on(device_type: str) -> bool:
    """Returns whether autocast is on for the type of a device. Meta has none, and torch raises if it is asked for."""
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def _mask_seed(x: Tensor, dropout_p: float, seed: int | None, traced: bool) -> int | Tensor:
    """Returns the seed as an int. In a traced graph and under CUDA graph capture it is a tensor on the device instead,
    because an int would be a constant there and repeat the same mask at every replay. For the torch ops on a GPU it is
    the mask itself, because they would have to wait for the device to read a seed."""
    if seed is not None and not (isinstance(seed, int) and 0 <= seed < seeds.SEEDS):
        raise checks.ArgumentError("seed", "an integer from 0 to 2**62 - 1", checks.shown(seed))
    device = x.device
    in_graph = traced or backend.is_capturing(device)
    if device.type != "cpu" and not backend.uses_triton(x):
        if seed is None:
            return linear_op.bernoulli_mask(x, dropout_p)
        if in_graph:
            expected = f"None, since torch.compile and CUDA graphs cannot seed the torch ops on {device.type}"
            raise checks.ArgumentError("seed", expected, checks.shown(seed))
        return linear_op.bernoulli_mask(x, dropout_p, torch.Generator(device).manual_seed(seed))
    if not in_graph:
        return seeds.draw(device) if seed is None else seed
    if seed is None:
        return torch.randint(seeds.SEEDS, (), dtype=torch.int64, device=device)
    return torch.full((), seed, dtype=torch.int64, device=device)
