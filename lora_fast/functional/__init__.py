"""Public functions on tensors. Each checks its arguments, then runs the op."""

from ..kernels.records import StepWork
from .batched import lora_linear_batched
from .cayley import cayley
from .dora import dora_linear
from .experts import lora_grouped_linear
from .linear import lora_linear
from .linear_group import LinearMember, lora_linear_group
from .pairs import adapter_step_, add_low_rank_, gram, hyperbalance, scalora_scaling, small_inverse, spd_solve

__all__ = [
    "LinearMember",
    "StepWork",
    "adapter_step_",
    "add_low_rank_",
    "cayley",
    "dora_linear",
    "gram",
    "hyperbalance",
    "lora_grouped_linear",
    "lora_linear",
    "lora_linear_batched",
    "lora_linear_group",
    "scalora_scaling",
    "small_inverse",
    "spd_solve",
]
