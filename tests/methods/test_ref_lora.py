"""RefLoRA: to first order its step does not depend on how the product is split into factors."""

import pytest
import torch
from torch import nn

import lora_fast as lf
from lora_fast import methods as M
from lora_fast.ops import pairs as twin


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def transformed_gradients(a, b, g):
    """Returns S da and db S⁻¹ for the gradient g of the product."""
    s, s_inverse = twin.refactor(a @ a.mT, b.mT @ b)
    return s @ (b.mT @ g), g @ a.mT @ s_inverse


def test_first_order_of_a_gradient_step_does_not_depend_on_the_split():
    start_a, start_b, g, x = draw(1, 4, 30), draw(1, 20, 4, seed=1), draw(1, 20, 30, seed=2), draw(4, 4, seed=3)
    changes = []
    for a, b in ((start_a, start_b), (torch.linalg.solve(x, start_a), start_b @ x)):
        da, db = transformed_gradients(a, b, g)
        changes.append(db @ a + b @ da)
    assert (changes[0] - changes[1]).norm() <= 1e-12 * changes[0].norm()


def test_gradients_are_those_of_the_balanced_factors():
    """The gradient steps of b' = b T and a' = T⁻¹ a, transformed back to b and a, are those of RefLoRA."""
    a, b, g = draw(1, 4, 30), draw(1, 20, 4, seed=1), draw(1, 20, 30, seed=2)
    t, t_inverse = twin.hyperbalance(a @ a.mT, b.mT @ b)
    da, db = transformed_gradients(a, b, g)
    assert torch.allclose(t @ ((b @ t).mT @ g), da) and torch.allclose(g @ (t_inverse @ a).mT @ t_inverse, db)


@pytest.mark.parametrize("case", ["b is zero", "a has not full rank"])
def test_gradients_are_unchanged_where_no_balanced_factors_exist(case):
    """The step is bitwise that of AdamW."""
    ends = []
    for methods in ([M.RefLoRA()], []):
        a, b = draw(4, 30), draw(20, 4, seed=1)
        if case == "b is zero":
            b.zero_()
        else:
            a[3] = 0
        pair = nn.Parameter(a), nn.Parameter(b)
        optimizer = lf.optim.LoRAAdamW([pair], lr=0.1, methods=methods)
        for p in pair:
            p.grad = draw(*p.shape, seed=2)
        optimizer.step()
        ends.append(pair)
    assert all(torch.equal(x, y) for x, y in zip(*ends, strict=True))
