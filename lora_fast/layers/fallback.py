"""Fallback: what every adapter layer says about its last call."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import ref

import torch
from torch import Tensor, nn

from .. import backend
from ..functional.linear import reason_against_op, run_composite, run_op
from . import groups

_traced = torch.compiler.is_compiling
_TENSORS = {"weight", "lora_A", "lora_B"}

if TYPE_CHECKING:
    Module = nn.Module
else:
    Module = object


class Fallback(Module):
    """A mixin for modules whose forward is the fused op wherever the op can serve the call.

    Attributes:
        fallback_reason: why the last call ran plain torch ops in place of the fused op; None if it did not. Compiled
            calls do not write it.
        siblings: the adapter layers of its parent, with which it is computed where they read one x; None if it is
            always computed by itself.
    """

    fallback_reason: str | None = None
    siblings: groups.Siblings | None = None
    takes_siblings = True  # whether its factors are parameters, which tell whether a result is still the right one
    has_own_op = False  # whether an op of its own computes it, so that it is in no group

    def _call(self, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling, dropout_p) -> Tensor:
        """Returns what ``functional.lora_linear`` returns, and notes the reason if plain ops compute it."""
        arguments = weight, bias, a, b, scaling, dropout_p
        # Tensors that are no parameters may lose their memory after the layer's backward (FSDP1).
        grouped = self.siblings is not None and not _traced() and self._parameters.keys() >= _TENSORS
        y = groups.taken(self, x, arguments) if grouped else None
        reason = None if y is not None else reason_against_op(x, weight, a, b)
        if reason is not self.fallback_reason:  # nn.Module.__setattr__ is slow, so it runs only for a change
            self._note(reason)
        if y is not None:
            return y
        if reason is not None:
            return run_composite(x, *arguments)
        return groups.run(self, x, arguments) if grouped else run_op(x, *arguments)

    def _note(self, reason: str | None) -> None:
        if not torch.compiler.is_compiling():  # writing an attribute would break the graph
            self.fallback_reason = reason
            if reason is not None and "replicated_from" in self.__dict__:
                self.__dict__["replicated_from"]._note(reason)

    def _replicate_for_data_parallel(self) -> Any:
        """Returns nn.DataParallel's replica for one call. Its reason also shows on this layer, and its thread uses the
        backend that a block of this thread has set."""
        self._note(None)
        replica: Any = super()._replicate_for_data_parallel()
        replica.__dict__.pop("siblings", None)  # they are on another device
        replica.__dict__["replicated_from"] = self  # nn.Module.__setattr__ would register a submodule
        if (name := backend.chosen_by_block()) is not None:
            replica.__dict__["forward"] = partial(_forward_in_block, name, ref(replica))
        return replica


def _forward_in_block(name: str, replica: ref, *args, **kwargs) -> Tensor:
    module: Any = replica()
    with backend.set_backend(name):
        return type(module).forward(module, *args, **kwargs)
