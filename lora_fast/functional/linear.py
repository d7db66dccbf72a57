"""The public function of a linear layer with its LoRA adapter: checks the arguments, then runs the op, or plain torch
ops where the op cannot serve the call."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .. import backend, checks
from ..ops import composite, seeds
from ..ops import linear as linear_op

# Looked up once, because attribute accesses cost host time in every layer's call. Function.apply is a Python method for
# functorch (vmap, grad), for which the plain ops run; it only calls the method that it overrides.
_any_autocast, _traced = torch._C._is_any_autocast_enabled, torch.compiler.is_compiling
_grad = torch.is_grad_enabled
_apply = super(torch.autograd.Function, linear_op.LoRALinearFunction).apply
reason_against_op = composite.reason


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float | Tensor,
    dropout_p: float = 0.0,
    seed: int | None = None,
) -> Tensor:
    """A frozen linear layer with its LoRA adapter (Hu et al., arXiv 2106.09685, eq. 3) as one differentiable op:
    ``y = x Wᵀ + bias + scaling · dropout(x) aᵀ bᵀ``.

    Only x and S = dropout(x) aᵀ are saved for backward. Under autocast x, weight and bias are cast to the autocast
    dtype, as in ``nn.Linear``. Products accumulate in float32 and are rounded once per result.

    PEFT's formula in plain torch ops runs where the op cannot serve the call: for nested and sparse tensors, subclasses
    of Tensor and the meta device, under the transforms of torch.func, forward-mode differentiation, torch.jit.trace
    (which torch 2.13 deprecates) and torch.export. The gradients are differentiable again (``create_graph=True``).

    Args:
        x: (..., d_in), float16, bfloat16, float32 or (torch backend) float64; any strides.
        weight: (d_out, d_in) in x's dtype; frozen (``requires_grad=False``).
        bias: (d_out,) in x's dtype, or float32 where that has 16 bits; or None.
        lora_A: (r, d_in), r from 1 to 256, any floating dtype; float32 keeps its precision outside autocast.
        lora_B: (d_out, r), likewise.
        scaling: alpha / r, or alpha / sqrt(r) for rsLoRA: a finite number, or a real tensor of one element on x's
            device or the CPU, which is not read on the host and gets a gradient if it requires one.
        dropout_p: probability that an element of x is dropped on the way to the adapter, in steps of 1/65536.
        seed: seed of the dropout mask, from 0 to 2⁶²-1. None draws from the default generator of x's device, as
            nn.Dropout does, so that ``torch.manual_seed`` and activation checkpointing reproduce the mask.

    Returns:
        y (..., d_out) in x's dtype (the autocast dtype under autocast). Each gradient has its argument's dtype.

    Raises:
        ArgumentError: shapes, dtypes, devices or values that do not fit.
        BackendError: the Triton backend is chosen and cannot run here.
    """
    run = run_op if reason_against_op(x, weight, lora_A, lora_B) is None else run_composite
    return run(x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed)


def run_op(x, weight, bias, lora_A, lora_B, scaling, dropout_p: float = 0.0, seed: int | None = None) -> Tensor:
    """Computes ``lora_linear`` by the op."""
    autocast = casts(x, weight)
    weight, bias, lora_A, lora_B, scaling, dropout_p = checked(
        x, autocast, weight, bias, lora_A, lora_B, scaling, dropout_p
    )
    if autocast:
        x = x.to(torch.get_autocast_dtype(x.device.type))
    if _traced():
        return _run_traced(x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed, autocast)
    triton = backend.forward_uses_triton(x)
    drawn = mask_seed(x, dropout_p, seed, False, triton) if dropout_p > 0.0 else None
    run = _apply if _grad() else linear_op.forward_without_grad
    ops = backend.load_ops("linear", triton)
    return run(ops, x, weight, bias, lora_A, lora_B, scaling, dropout_p, drawn, autocast)


def in_autocast(x) -> bool:
    """Returns whether autocast casts the products of x."""
    return _any_autocast() and is_autocast_on(x.device.type) and x.dtype != torch.float64


def casts(x, weight) -> bool:
    """Returns whether autocast casts x for a layer with this weight. A quantised weight's library decides for itself,
    and S is then computed from x as it is."""
    return in_autocast(x) and getattr(weight, "dtype", x) is not None


def checked(x, autocast: bool, weight, bias, lora_A, lora_B, scaling, dropout_p) -> tuple:
    """Returns the arguments after x, the numbers as Python's. A scaling in a tensor becomes a factor of lora_B.

    Raises:
        ArgumentError: as ``lora_linear``.
    """
    factor = None
    if type(scaling) not in checks.NUMBERS or type(dropout_p) not in checks.NUMBERS:
        scaling, dropout_p = _plain_numbers(scaling, dropout_p, x)
        if isinstance(scaling, Tensor):
            factor, scaling = scaling, 1.0
    checks.lora_linear(x, weight, bias, lora_A, lora_B, scaling, dropout_p, autocast)
    if factor is not None:  # the product is small, and the factor keeps its gradient and stays on its device
        lora_B = lora_B * factor
    return weight, bias, lora_A, lora_B, scaling, dropout_p


def _run_traced(x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed, autocast) -> Tensor:
    triton = backend.uses_triton(x)
    drawn = mask_seed(x, dropout_p, seed, True, triton) if dropout_p > 0.0 else None
    if weight.dtype is not x.dtype:
        # In a region of its own the compiler casts again in backward, and in a checkpointed region once for all
        # that runs again there. It would keep the copy of a plain cast from forward to backward.
        weight = checkpoint(weight.to, x.dtype, use_reentrant=False, preserve_rng_state=False)
    return linear_op.lora_linear_op(x, weight, bias, lora_A, lora_B, scaling, dropout_p, drawn, autocast, triton)[0]


def run_composite(x, weight, bias, lora_A, lora_B, scaling, dropout_p: float = 0.0, seed: int | None = None) -> Tensor:
    """Computes ``lora_linear`` by plain torch ops. Where x has a shape to check (that of a trace is no constant) and no
    tensor is of a subclass, which may refuse to be read, the arguments are checked as those of the op, except that the
    weight may be trained."""
    scaling, dropout_p = _plain_numbers(scaling, dropout_p, x)
    keep = None
    check(x, weight, bias, lora_A, lora_B, 1.0 if isinstance(scaling, Tensor) else scaling, dropout_p)
    if seed is not None and dropout_p > 0.0:
        seeds.check(seed)
        if x.is_nested or x.layout is not torch.strided:
            raise checks.ArgumentError("seed", "None for a nested or sparse x", checks.shown(seed))
        keep = linear_op.mask_like(x, dropout_p, seed)
    return composite.linear(x, weight, bias, lora_A, lora_B, scaling, dropout_p, keep)


def check(x, weight, bias, lora_A, lora_B, scaling: float, dropout_p: float) -> None:
    """Raises ArgumentError if the arguments do not fit, except that the weight may be trained, where x has a shape to
    check and no tensor is of a subclass."""
    is_plain = all(type(tensor) in checks.PLAIN for tensor in (x, weight, lora_A, lora_B))
    if is_plain and not x.is_nested and (_traced() or composite.transform() != composite.JIT_TRACE):
        checks.lora_linear(x, weight.detach(), bias, lora_A, lora_B, scaling, dropout_p, in_autocast(x))
    elif isinstance(weight, Tensor) and weight.dtype not in checks.FLOATS:  # a library's own tensor
        expected = "a floating tensor or, of a quantised layer, lora_fast.quantized.quantized_weight(layer)"
        raise checks.ArgumentError("weight", expected, checks.shown(weight))


def _plain_numbers(scaling, dropout_p, x: Tensor) -> tuple[float | Tensor, float]:
    """Returns the numbers as Python's, and a scaling in a tensor without dimensions. A ``dropout_p`` in a tensor is
    read on the host, as by nn.Dropout."""
    p = checks.plain_number(dropout_p)
    device = getattr(x, "device", None)  # what x is, is checked later
    return checks.scaling(scaling, device), checks.probability(float(p) if isinstance(p, bool) else p, "dropout_p")


def narrow(factor: Tensor) -> Tensor:
    """Returns a factor in a dtype that all kernels load: float32 for float64."""
    return factor.float() if factor.dtype is torch.float64 else factor


def is_autocast_on(device_type: str) -> bool:
    """Returns whether autocast is on for the type of a device. Meta has none, and torch raises if it is asked for."""
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def mask_seed(x: Tensor, dropout_p: float, seed: int | None, traced: bool, triton: bool) -> int | Tensor:
    """Returns the seed as an int. In a traced graph and under CUDA graph capture it is a tensor on the device instead,
    because an int would be a constant there and repeat the same mask at every replay. For the torch ops on a GPU it is
    the mask itself, because they would have to wait for the device to read a seed."""
    if seed is not None:
        seeds.check(seed)
    device = x.device
    in_graph = traced or backend.is_capturing(device)
    if device.type != "cpu" and not triton:
        if seed is None:
            return linear_op.bernoulli_mask(x, dropout_p)
        if in_graph:
            expected = f"None, since torch.compile and CUDA graphs cannot seed the torch ops on {device.type}"
            raise checks.ArgumentError("seed", expected, checks.shown(seed))
        return linear_op.bernoulli_mask(x, dropout_p, torch.Generator(device).manual_seed(seed))
    if not in_graph:
        return seeds.draw(device) if seed is None else seed
    if seed is None and not triton:  # the keys of a mask that a compiler can draw
        return torch.randint(-(1 << 31), (1 << 31) - 1, (2,), dtype=torch.int32, device=device)
    if seed is None:
        return torch.randint(seeds.SEEDS, (), dtype=torch.int64, device=device)
    return torch.full((), seed, dtype=torch.int64, device=device)
