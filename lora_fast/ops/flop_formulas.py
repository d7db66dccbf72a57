"""The operations of the registered ops for torch's counter (``torch.utils.flop_counter``): those of their products, two
for each multiplication. The formulas take the shapes of the ops' arguments.

Importing the counter takes 0.2 s, because it imports Triton. The formulas are therefore registered when someone else
imports it.
"""

from __future__ import annotations

import sys
from math import prod

import torch

from ..at_import import after_import
from . import cayley as _cayley  # noqa: F401  (defines its ops)
from . import experts as _experts  # noqa: F401
from . import linear as _linear  # noqa: F401

COUNTER = "torch.utils.flop_counter"


def linear(x, weight, bias, lora_A, *arguments, **keywords) -> int:
    """Returns the operations of S = x aᵀ and y = x Wᵀ + S bᵀ."""
    return 2 * prod(x[:-1]) * (prod(weight) + lora_A[0] * sum(weight))


def linear_backward(dy, x, s, weight, *arguments, **keywords) -> int:
    """Returns the operations of dS = dy b, db = dyᵀ S, da = dSᵀ x and dx = dy W + dS a, those that are needed."""
    need_x, need_a, need_b = arguments[-1]
    tokens, r = s
    d_out, d_in = weight
    products_of_d_out = need_b + (need_x or need_a)
    products_of_d_in = need_a + need_x
    return 2 * tokens * (r * (products_of_d_out * d_out + products_of_d_in * d_in) + need_x * d_out * d_in)


def grouped_linear(x, weight, lora_A, *arguments, **keywords) -> int:
    """Returns the operations of S_e = x_e a_eᵀ and y_e = x_e W_eᵀ + S_e b_eᵀ of all experts."""
    return linear(x, weight[1:], None, lora_A[1:])


def grouped_linear_backward(dy, x, s, weight, *arguments, **keywords) -> int:
    """Returns the operations of ``linear_backward`` of all experts."""
    return linear_backward(dy, x, s, weight[1:], arguments[-1])


def grouped_product(rows, weight, *arguments, **keywords) -> int:
    """Returns the operations of rows_e W_e of all experts."""
    return 2 * prod(rows) * weight[2]


def cayley(free_a, free_b, *arguments, **keywords) -> int:
    """Returns the operations of a2 a2ᵀ, bᵀ b, Wiᵀ a and b Wi of every pair."""
    return sum(2 * r * r * (2 * d_in - r + 2 * d_out) for (r, d_in), (d_out, _) in zip(free_a, free_b, strict=True))


def cayley_backward(free_a, free_b, *arguments, **keywords) -> int:
    """Returns the operations of bᵀ gb, a2 ga2ᵀ, R a, Wi ga, b R, gb Wiᵀ and two products (r, r) of every pair."""
    return sum(6 * r * r * (d_in + d_out) + 2 * r**3 for (r, d_in), (d_out, _) in zip(free_a, free_b, strict=True))


FORMULAS = {
    "lora_linear": linear,
    "lora_linear_backward": linear_backward,
    "grouped_linear": grouped_linear,
    "grouped_linear_backward": grouped_linear_backward,
    "grouped_product": grouped_product,
    "cayley": cayley,
    "cayley_backward": cayley_backward,
}


def register() -> None:
    """Registers the formulas with the counter."""
    for name, formula in FORMULAS.items():
        sys.modules[COUNTER].register_flop_formula(getattr(torch.ops.lora_fast, name))(formula)


after_import(COUNTER, register)
