"""The public function of a linear layer with several LoRA adapters in one batch: checks the arguments, then runs the
op, or plain torch ops where the op cannot serve the call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import backend, checks
from ..ops import batched as batched_op
from ..ops.composite import transform
from ..ops.observers import sees_ops
from .linear import in_autocast, narrow, reason_against_op

INDICES = (torch.int32, torch.int64)


def lora_linear_batched(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    scaling: Sequence[float],
    adapter_indices: Tensor,
) -> Tensor:
    """A frozen linear layer for a batch in which each row has a LoRA adapter of its own, as a server computes it
    (SGMV in Punica, Chen et al., arXiv 2310.18547): ``y = x Wᵀ + bias + scaling_k · x a_kᵀ b_kᵀ`` for the rows x of
    adapter k, and ``y = x Wᵀ + bias`` for rows of none.

    The base product is torch's own. The adapters are two launches, however many there are and whatever their ranks, and
    the update is added to y in place. Rows are sorted by adapter on the device, and the host does not wait for it. A
    CUDA graph captures the call after one call with these factors outside; its replays take other x and indices (not
    verified on a GPU). Under autocast x, weight and bias are cast to the autocast dtype; the factors keep their own.

    It is made for inference. If a gradient is needed, plain torch ops compute the same, differentiably, one adapter
    after another for all rows. They also run where the op cannot serve the call, as in ``lora_linear``.

    Args:
        x: (..., d_in), float16, bfloat16, float32 or (torch backend) float64; any strides.
        weight: (d_out, d_in) in x's dtype; frozen.
        bias: (d_out,) in x's dtype, or None.
        lora_A: a (r, d_in) of each adapter, with ranks from 1 to 256 that may differ; any floating dtype, one for all
            factors.
        lora_B: b (d_out, r) of each adapter.
        scaling: alpha / r, or alpha / sqrt(r) for rsLoRA, of each adapter.
        adapter_indices: int32 or int64, the number of each row's adapter, of shape ``x.shape[:-1]``, or of each
            sample's, of shape ``x.shape[:1]``; -1 for none. On a GPU, where the values are not checked, any number that
            is no adapter's stands for none.

    Returns:
        y (..., d_out) in x's dtype (the autocast dtype under autocast).

    Raises:
        ArgumentError: shapes, dtypes, devices or values that do not fit.
        BackendError: the Triton backend is chosen and cannot run here.
    """
    scaling = _check(x, weight, bias, lora_A, lora_B, scaling, adapter_indices)
    if in_autocast(x):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        with torch.autocast(x.device.type, enabled=False):
            return _run(x, weight, bias, lora_A, lora_B, scaling, adapter_indices)
    return _run(x, weight, bias, lora_A, lora_B, scaling, adapter_indices)


def _run(x, weight, bias, lora_A, lora_B, scaling, adapter_indices) -> Tensor:
    if _takes_plain_ops(x, weight, bias, lora_A, lora_B):
        return batched_op.composite(x, weight, bias, lora_A, lora_B, scaling, adapter_indices)
    samples, tokens = adapter_indices.numel(), x.shape[:-1].numel()
    places = batched_op.sort_rows(adapter_indices.reshape(-1), len(scaling), tokens // samples if samples else 1)
    return run_op(backend.ops("batched", x), x, weight, bias, lora_A, lora_B, scaling, *places)


def run_op(ops, x, weight, bias, lora_A, lora_B, scaling, rows: Tensor, ends: Tensor) -> Tensor:
    """Computes ``lora_linear_batched`` by the op without checks, for the rows of x as ``ops.sorted_rows`` returns
    them."""
    if ops is not batched_op.reference:
        lora_A, lora_B = ([narrow(factor).contiguous() for factor in factors] for factors in (lora_A, lora_B))
    return batched_op.forward(ops, x, weight, bias, ops.adapter_table(lora_A, lora_B, scaling), rows, ends)


def _takes_plain_ops(x, weight, bias, lora_A, lora_B) -> bool:
    """Returns whether plain ops have to compute the call."""
    factors = *lora_A, *lora_B
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, bias, *factors)):
        return True
    reasons = (reason_against_op(x, weight, a, b) for a, b in zip(lora_A, lora_B, strict=True))
    return torch.compiler.is_compiling() or sees_ops() or any(reason is not None for reason in reasons)


def _check(x, weight, bias, lora_A, lora_B, scaling, adapter_indices) -> list[float]:
    """Checks the arguments and returns the scalings as numbers of Python."""
    if checks.tensor(x, "x").layout is not checks.STRIDED or x.is_nested:
        raise checks.ArgumentError("x", "a dense tensor", "a nested one" if x.is_nested else x.layout)
    count = len(checks.sequence(lora_A, "lora_A"))
    if count == 0:
        raise checks.ArgumentError("lora_A", "the factors of at least one adapter", "none")
    for name, values in (("lora_B", lora_B), ("scaling", scaling)):
        if len(checks.sequence(values, name)) != count:
            raise checks.ArgumentError(name, f"{count} entries, as lora_A has", f"{len(values)}")
    for name, factors in (("lora_A", lora_A), ("lora_B", lora_B)):
        for i, factor in enumerate(factors):
            if checks.tensor(factor, f"{name}[{i}]").dtype is not lora_A[0].dtype:
                raise checks.ArgumentError(f"{name}[{i}]", f"the dtype of lora_A[0], {lora_A[0].dtype}", factor.dtype)
    autocast = in_autocast(x)
    for i, (a, b, scale) in enumerate(zip(lora_A, lora_B, scaling, strict=True)):
        scale = checks.python_number(scale)
        try:
            checks.lora_linear(x, weight, bias, a, b, scale, 0.0, autocast)
        except checks.ArgumentError as error:
            if error.argument in ("lora_A", "lora_B", "scaling"):
                raise checks.ArgumentError(f"{error.argument}[{i}]", error.expected, error.got) from None
            raise
    if bias is not None and bias.dtype is not x.dtype and not autocast:
        raise checks.ArgumentError("bias", f"x's dtype {x.dtype} (or an autocast region)", bias.dtype)
    check_indices(checks.tensor(adapter_indices, "adapter_indices"), x, count)
    return [float(checks.python_number(scale)) for scale in scaling]


def check_indices(indices: Tensor, x: Tensor, n_adapters: int) -> None:
    """Checks the dtype, device and shape of the adapters' numbers and, where that does not wait for a device, their
    values."""
    if indices.dtype not in INDICES:
        raise checks.ArgumentError("adapter_indices", "dtype torch.int32 or torch.int64", indices.dtype)
    if indices.device != x.device:
        raise checks.ArgumentError("adapter_indices", f"a tensor on x's device {x.device}", indices.device)
    if indices.layout is not checks.STRIDED:
        raise checks.ArgumentError("adapter_indices", "a dense tensor", indices.layout)
    shapes = x.shape[: min(1, x.dim() - 1)], x.shape[:-1]
    if indices.shape not in shapes:  # not of a set: traced sizes have no hash
        expected = f"a shape among {[*dict.fromkeys(map(tuple, shapes))]} to fit x {tuple(x.shape)}"
        raise checks.ArgumentError("adapter_indices", expected, tuple(indices.shape))
    is_traced = torch.compiler.is_compiling() or transform() is not None
    if type(indices) is Tensor and indices.is_cpu and not is_traced and indices.numel():
        low, high = indices.min().item(), indices.max().item()
        if low < -1 or high >= n_adapters:
            expected = f"numbers from -1 to {n_adapters - 1}"
            raise checks.ArgumentError("adapter_indices", expected, f"numbers from {low} to {high}")
