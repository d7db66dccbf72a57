"""The adapter step's operations on stacked pairs: the one place that decides who computes them.

The plain-torch twins do, on every device: they run on CUDA as they are, batched over all pairs of one shape, and wait
for no device. Methods and optimizer call these names only, so that kernels can take their place here.
"""

from .reference_scalora import ROUNDINGS, SOLVERS, merge_, scalora_scaling, scalora_solve
from .reference_step import (
    GAUGES,
    Grams,
    adamw,
    grams,
    hyperbalance,
    imbalance_step_,
    precondition_,
    rite_factor,
    rite_update,
    small_inverse,
    spd_inverse,
    spd_solve,
    wide,
)

__all__ = [
    "GAUGES",
    "ROUNDINGS",
    "SOLVERS",
    "Grams",
    "adamw",
    "grams",
    "hyperbalance",
    "imbalance_step_",
    "merge_",
    "precondition_",
    "rite_factor",
    "rite_update",
    "scalora_scaling",
    "scalora_solve",
    "small_inverse",
    "spd_inverse",
    "spd_solve",
    "wide",
]
