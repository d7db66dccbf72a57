"""The modules of transformers that hold the weights of experts, and how each computes with them.

``experts_of`` names the kind of such a module. A kind computes what the module's own forward does, with every linear
layer of the experts given to it as a function. Modules with a forward of their own are of no kind.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations import moe

from .. import checks
from ..functional.linear import is_autocast_on
from ..ops.routing import route, to_experts, to_tokens

Linear = Callable[[str, Tensor, Tensor], Tensor]  # parameter's name, rows sorted by expert, offsets → the results
EAGER = (None, "eager")
GROUPED = "grouped_mm"
_decorated: Any = moe.use_experts_implementation(type("Experts", (nn.Module,), {"forward": lambda self: None}))
_DISPATCHING: Any = _decorated.forward.__code__  # of the forward that transformers' decorator gives to a class


class RoutedExperts:
    """Experts of transformers' ``use_experts_implementation``: ``module(hidden_states, top_k_index, top_k_weights)``
    sends each token to its experts."""

    @staticmethod
    def parameters(module: Any) -> tuple[str, str]:
        return "gate_up_proj" if getattr(module, "has_gate", True) else "up_proj", "down_proj"

    @staticmethod
    def is_transposed(module: Any) -> bool:
        return module.is_transposed

    @staticmethod
    def bias(module: Any, name: str) -> Tensor | None:
        return getattr(module, f"{name}_bias") if module.has_bias else None

    @staticmethod
    def reason(module: Any, dtype: torch.dtype, x: Tensor, *routing: Any) -> str | None:
        """Returns why a call with weights of this dtype is left to the module's own forward, or None."""
        if getattr(module, "_is_expert_parallel", False) or len(module.down_proj) != module.num_experts:
            return "expert parallelism"
        implementation = module.config._experts_implementation
        if implementation in EAGER:
            if not type(module).forward.__module__.startswith("transformers.models."):
                return f"eager forward of {type(module).__name__}"
        elif moe.ALL_EXPERTS_FUNCTIONS.get(implementation) not in _served():
            return f"experts implementation {implementation!r}"
        if len(routing) != 2 or not all(isinstance(part, Tensor) for part in routing):
            return "extra arguments"
        index, weights = routing
        if x.dim() != 2 or index.dim() != 2 or len(index) != len(x) or weights.shape != index.shape:
            return f"routing of shapes {tuple(index.shape)} and {tuple(weights.shape)} for x {tuple(x.shape)}"
        return None if implementation == GROUPED else reason_against_dtype(x, dtype)

    @staticmethod
    def forward(module: Any, linear: Linear, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """Returns what the module does, in the order of casts and roundings of transformers' grouped forward."""
        up, down = RoutedExperts.parameters(module)
        _check(index, module.num_experts)
        routing = route(index, module.num_experts)
        rows = linear(up, to_experts(x, routing), routing.offsets)
        rows = module._apply_gate(rows) if up == "gate_up_proj" else module.act_fn(rows)
        rows = linear(down, rows, routing.offsets)
        if getattr(module, "has_post_expert_norm", False):
            rows = module.post_expert_norm(rows)
        return (to_tokens(rows, routing) * weights.unsqueeze(-1)).sum(1).to(x.dtype)


class SortedExperts:
    """A linear layer of all experts, whose caller has sorted the rows: ``module(inputs, expert_size)`` with the number
    of rows of each expert, as transformers' JetMoE has it, and Granite-MoE in transformers 5.0."""

    @staticmethod
    def parameters(module: Any) -> tuple[str]:
        return ("weight",)

    @staticmethod
    def is_transposed(module: Any) -> bool:
        return False

    @staticmethod
    def bias(module: Any, name: str) -> Tensor | None:
        return None

    @staticmethod
    def reason(module: Any, dtype: torch.dtype, x: Tensor, *sizes: Any) -> str | None:
        if len(sizes) != 1 or not isinstance(sizes[0], (list, tuple)):
            return "extra arguments"
        counts = sizes[0]
        if len(counts) != module.num_experts or x.dim() != 2 or sum(counts) != len(x) or min(counts) < 0:
            return f"{len(counts)} sizes of {sum(counts)} rows for x {tuple(x.shape)}"
        return reason_against_dtype(x, dtype)

    @staticmethod
    def forward(module: Any, linear: Linear, x: Tensor, sizes: list[int]) -> Tensor:
        offsets = torch.tensor(list(accumulate(sizes)), dtype=torch.int32, device="cpu")
        return linear("weight", x, offsets.to(x.device, non_blocking=True))


Experts = type[RoutedExperts] | type[SortedExperts]


def experts_of(module: nn.Module) -> Experts | None:
    """Returns the kind of a module that holds experts' weights, None for a module with a forward of its own."""
    forward: Any = getattr(type(module), "forward", None)
    if getattr(forward, "__code__", None) is _DISPATCHING:
        cells: dict[str, Any] = dict(zip(forward.__code__.co_freevars, forward.__closure__, strict=True))
        own = "experts_interface" in cells and cells["experts_interface"].cell_contents is not moe.ALL_EXPERTS_FUNCTIONS
        return None if own else RoutedExperts
    name, home = getattr(forward, "__qualname__", ""), getattr(forward, "__module__", "")
    is_sorted = name.endswith("ParallelExperts.forward") and home.startswith("transformers.models.")
    return SortedExperts if is_sorted else None


def reason_against_dtype(x: Tensor, dtype: torch.dtype) -> str | None:
    """Returns why products of x and weights of this dtype are not computed in it by torch's own linear layer."""
    autocast = is_autocast_on(x.device.type) and x.dtype is not torch.float64
    computed = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
    if computed is dtype:
        return None
    return f"{dtype} experts under autocast to {computed}" if autocast else f"{x.dtype} input to {dtype} weights"


def _served() -> tuple[Any, Any]:
    """Returns the forwards of transformers that compute what ``RoutedExperts.forward`` does."""
    return moe.grouped_mm_experts_forward, moe.batched_mm_experts_forward


def _check(index: Tensor, n_experts: int) -> None:
    """Checks the numbers of the experts, where that does not wait for a device. The number of experts itself marks what
    is not computed."""
    if not index.is_cpu or torch.compiler.is_compiling() or index.numel() == 0:
        return
    least, greatest = map(int, torch.aminmax(index))
    if least < 0 or greatest > n_experts:
        got = f"from {least} to {greatest}"
        raise checks.ArgumentError("top_k_index", f"numbers of {n_experts} experts, or {n_experts} for none", got)
