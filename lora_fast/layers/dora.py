"""DoRA (arXiv 2402.09353): y = c∘U + bias, where U is the layer's result without its bias and c = magnitude /
‖W + s b a‖, the norm of each row, through which no gradient flows.

The norms are kept until a tensor that they depend on changes. On a CPU the values of a and b are compared, and of W its
memory, its version and at least one entry of each row and column, so that writing single entries of a frozen weight
through ``.data`` is not noticed. Elsewhere comparing would wait for the device. There memory and versions are compared,
and norms are kept in calls without gradients and for the second run of a checkpointed region alone, because an
optimizer may change parameters through ``.data``, which versions do not show. ``train()`` and ``eval()`` forget the
norms. Traced and captured calls compute their own, which are part of the graph.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from .. import backend
from ..functional.dora import column_scale, plus_dropped, scaled_linear, weight_norms
from ..kernels import device
from ..ops import composite
from ..ops import dora as dora_op
from ..quantized import QuantizedWeight
from ..regions import unseen

_traced, _grad, _graph_task = torch.compiler.is_compiling, torch.is_grad_enabled, torch._C._current_graph_task_id


def dora(
    x: Tensor, call: tuple, magnitude: Tensor, norms: RowNorms | None, linear: Callable[[Tensor, tuple], Tensor]
) -> Tensor:
    """Returns y (..., d_out) of x (..., d_in).

    Args:
        call: ``functional.lora_linear``'s arguments after x.
        magnitude: (d_out,).
        norms: those that the layer keeps; None computes them.
        linear: computes U over a quantised weight from x and such arguments, alone or with the layer's group. Layers
            over plain weights have an op each: a group's would write U and read it again, which moves more bytes than
            reading x once saves.
    """
    weight, bias, a, b, scaling, dropout_p = call
    rows = row_norms(weight, a, b, scaling) if norms is None else norms.of(weight, a, b, scaling)
    kept = F.dropout(x, dropout_p) if dropout_p > 0.0 else x  # as PEFT's layer, whose base result gets it, too
    if isinstance(weight, QuantizedWeight):
        u = linear(kept, (weight, None, a, b, scaling, 0.0))
        return _over_quantized(u, magnitude, rows, weight, None if kept is x else x - kept)
    y = scaled_linear(kept, weight, bias if kept is x else None, a, b, magnitude, rows, scaling)
    return y if kept is x else plus_dropped(y, x, kept, weight, bias)


def group_arguments(call: tuple) -> tuple | None:
    """Returns the arguments with which a group computes a DoRA layer's U, None where it does not."""
    weight, _, *rest, dropout_p = call
    is_apart = not isinstance(weight, QuantizedWeight) or dropout_p > 0.0  # dropout leaves the layer an x of its own
    return None if is_apart else (weight, None, *rest, dropout_p)


def _over_quantized(
    u: Tensor, magnitude: Tensor, rows: Tensor, weight: QuantizedWeight, dropped: Tensor | None
) -> Tensor:  # fmt: skip
    """Returns y over a quantised weight, whose library adds its own bias to U: c∘(U - bias) + bias, or plus the
    library's result of what dropout has taken from x."""
    bias, scale = weight.module.bias, magnitude / rows
    if bias is not None:
        bias = (1 - scale) * bias if dropped is None else -scale * bias
    y = column_scale(u, magnitude, rows, bias)
    return y if dropped is None else y + weight.product(dropped).to(y.dtype)


def row_norms(weight: Any, a: Tensor, b: Tensor, scaling: Any, squares: Tensor | None = None) -> Tensor:
    """Returns ‖W + scaling · b a‖ of each row in a's dtype, (d_out,), for arguments of the op."""
    if isinstance(weight, QuantizedWeight):
        weight = weight.dequantized(weight.original_dtype or a.dtype)
    if isinstance(scaling, Tensor):
        b, scaling = b.detach() * scaling.detach(), 1.0
    return weight_norms(weight, a, b, float(scaling), squares)


def scale_of(magnitude: Tensor, rows: Tensor) -> Tensor:
    """Returns magnitude / norms in at least float32, by which a merged weight is scaled."""
    wide = torch.promote_types(torch.promote_types(magnitude.dtype, rows.dtype), torch.float32)
    return magnitude.detach().to(wide) / rows.to(wide)


def kept_norms(layer: Any) -> RowNorms | None:
    """Returns the norms that a layer keeps; None for a replica of nn.DataParallel, which lives for one call."""
    state = layer.__dict__
    return None if "_is_replica" in state else state.setdefault("_norms", RowNorms())


class RowNorms:
    """The norms that a layer keeps. A copy of the layer begins without any."""

    __slots__ = ("_kept", "_squares")

    def __init__(self) -> None:
        self._kept: _Kept | None = None
        self._squares: tuple[_Source, Tensor] | None = None  # ‖W‖² of each row, which the kernels do not need

    def __deepcopy__(self, memo: dict) -> RowNorms:
        return RowNorms()

    def __reduce__(self) -> tuple:
        return RowNorms, ()

    def of(self, weight: Any, a: Tensor, b: Tensor, scaling: float | Tensor) -> Tensor:
        """Returns ``row_norms``, computed where a tensor has changed or may have."""
        place = a.device
        if _traced() or not _tells_changes(weight, a, b, scaling) or backend.is_capturing(place):
            return row_norms(weight, a, b, scaling)
        trains = _grad() and place.type != "cpu"
        rerun = _graph_task() != -1  # a forward inside a backward is the second run of a checkpointed region
        kept = self._kept  # read once: another thread may replace it at any time
        with unseen(), _outside_inference():
            if kept is None or (not rerun and (trains or kept.trained)) or not kept.matches(weight, a, b, scaling):
                # Sources are read before the norms: a change by another thread after this makes them invalid.
                sources = _Source(weight, _sample(weight)), _Source(a, a), _Source(b, b)
                with torch.inference_mode(False):  # a later call may save them for its backward
                    rows = row_norms(weight, a, b, scaling, self._squares_of(weight, sources[0]))
                self._kept = kept = _Kept(rows, sources, scaling, trains, device.stream_on(place))
        return kept.rows

    def _squares_of(self, weight: Tensor, source: _Source) -> Tensor | None:
        """Returns ‖W‖² of each row on a CPU, computed where W has changed."""
        if not weight.is_cpu:
            return None
        squares = self._squares
        if squares is None or not squares[0].is_same(weight, _sample(weight)):
            self._squares = squares = source, dora_op.reference.row_squares(weight)
        return squares[1]


class _Kept:
    """The norms of a layer, and what they were computed from.

    Attributes:
        rows: the norms (d_out,).
        trained: whether they were computed for a call with gradients on another device than the CPU.
        stream: the stream on which they were computed. They may not be there yet for a call on another one.
    """

    __slots__ = ("rows", "scaling", "sources", "stream", "trained")

    def __init__(self, rows: Tensor, sources: tuple[_Source, ...], scaling: Any, trained: bool, stream: int):
        self.rows, self.sources, self.scaling, self.trained, self.stream = rows, sources, scaling, trained, stream

    def matches(self, weight: Tensor, a: Tensor, b: Tensor, scaling: Any) -> bool:
        """Returns whether the norms are those of these tensors, on the current stream."""
        of_weight, of_a, of_b = self.sources
        is_current = self.scaling == scaling and self.stream == device.stream_on(a.device)
        return is_current and of_a.is_same(a, a) and of_b.is_same(b, b) and of_weight.is_same(weight, _sample(weight))


class _Source:
    """This object tells whether a tensor has changed. It does not keep the tensor's memory, only the address from being
    used again.

    Attributes:
        values: on a CPU, a copy of the values that are compared.
    """

    __slots__ = ("layout", "storage", "values", "version")

    def __init__(self, tensor: Tensor, compared: Tensor):
        self.storage, self.layout = StorageWeakRef(tensor.untyped_storage()), _layout(tensor)
        self.version = tensor._version
        self.values = compared.detach().clone() if tensor.is_cpu else None

    def is_same(self, tensor: Tensor, compared: Tensor) -> bool:
        """Returns whether it is the same tensor, unchanged as far as ``compared`` shows."""
        return (
            tensor._version == self.version
            and tensor.untyped_storage()._cdata == self.storage.cdata
            and _layout(tensor) == self.layout
            and (self.values is None or torch.equal(compared, self.values))
        )


def _outside_inference() -> AbstractContextManager:
    """Returns a context in which the norms become tensors that a later call with gradients can save."""
    return torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext()


def _layout(tensor: Tensor) -> tuple:
    return tensor.dtype, tensor.shape, tensor.stride(), tensor.storage_offset()


def _sample(weight: Tensor) -> Tensor:
    """Returns a view of about d_in + d_out entries of a weight, at least one of each row and of each column."""
    dense = weight if weight.is_contiguous() else weight.mT
    if not dense.is_contiguous():
        return weight
    rows, columns = dense.shape
    step = max(1, rows * columns // (rows + columns))
    while math.gcd(step, columns) > 1:
        step -= 1
    return dense.view(-1)[::step]


def _tells_changes(weight: Any, a: Tensor, b: Tensor, scaling: float | Tensor) -> bool:
    """Returns whether it can be told later whether these have changed."""
    tensors = weight, a, b
    if isinstance(weight, QuantizedWeight) or isinstance(scaling, Tensor):
        return False
    return composite.reason_for_parameters(tensors) is None and not any(tensor.is_inference() for tensor in tensors)
