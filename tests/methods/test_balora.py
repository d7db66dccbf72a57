"""BaLoRA's transport of Adam's moments: the chain rule where b has full rank, and bounded steps where it does not."""

import proportion
import pytest
import torch

import lora_fast as lf
from lora_fast import methods as M
from lora_fast.ops import pairs as ops

GAUGES = pytest.mark.parametrize("gauge", ops.GAUGES)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@GAUGES
def test_transport_of_full_rank_is_the_chain_rule(gauge):
    """The moments transform as the gradients of b' = b T and a' = T⁻¹ a, which autograd computes."""
    a, b, full = draw(4, 20), draw(12, 4, seed=1), draw(12, 20, seed=2)
    ka, kb = (a @ a.T)[None], (b.T @ b)[None]
    t, t_inverse, u, u_inverse, deficient = ops.hyperbalance_and_transport(ka, kb, gauge)
    assert not deficient.any()
    factors = [p.detach().requires_grad_() for p in (a, b)]
    balanced = [p.detach().requires_grad_() for p in (t_inverse[0] @ a, b @ t[0])]
    for x, y in (factors, balanced):
        (full * (y @ x)).sum().backward()
    torch.testing.assert_close(u[0].T @ factors[0].grad, balanced[0].grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(factors[1].grad @ u_inverse[0].T, balanced[1].grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_transport_leaves_directions_in_which_b_vanishes_alone(dtype):
    """b vanishes along one direction of each pair. The symmetric gauge changes nothing along it. Orthogonally to it,
    the transport is that of the pair without that direction."""
    a, b = draw(3, 4, 20), draw(3, 12, 4, seed=1)
    q = torch.linalg.qr(draw(3, 4, 4, seed=2))[0]
    null, live = q[..., :1], q[..., 1:]
    b = b @ live @ live.mT
    ka, kb = (a @ a.mT).to(dtype), (b.mT @ b).to(dtype)
    *_, u, u_inverse, deficient = ops.hyperbalance_and_transport(ka, kb, "symmetric")
    tolerance = {"rtol": 0, "atol": 1e-9 if dtype == torch.float64 else 1e-3}
    for matrix in (u, u_inverse):
        torch.testing.assert_close(matrix.double() @ null, null, **tolerance)
    assert deficient.all()
    live_kb = live.mT @ kb.double() @ live
    live_ka = live.mT @ ka.double() @ live
    t, _ = ops.hyperbalance(live_ka, live_kb)
    torch.testing.assert_close(live.mT @ u.double() @ live, t.double(), **tolerance)


EACH_ONCE = [("mv", "symmetric"), ("m", "svd"), ("none", "svd_signed")]  # by default; the others with -m budget
TRANSPORTS = [
    pytest.param(gauge, transport, marks=[pytest.mark.budget] * ((transport, gauge) not in EACH_ONCE))
    for transport in ("none", "m", "mv")
    for gauge in ops.GAUGES
]


@pytest.mark.parametrize("gauge, transport", TRANSPORTS)
def test_product_moves_in_proportion_where_factors_lack_full_rank(gauge, transport):
    methods = [M.BaLoRA(gauge=gauge, transport=transport)]
    for dtype, rank in ((torch.float32, None), (torch.float64, 1)):
        for size in proportion.SIZES:
            for kind in proportion.KINDS:
                move = proportion.largest_move(methods, size, kind, dtype, 20, rank)
                assert move < 100, (dtype, size, kind, rank)


def test_balanced_product_is_unchanged_where_rank_exceeds_the_widths():
    for d_out, d_in, r in proportion.WIDE:
        a, b = draw(r, d_in), draw(d_out, r, seed=1)
        new_a, new_b = lf.functional.hyperbalance(a, b)
        assert (new_b @ new_a - b @ a).norm() <= 1e-6 * (b @ a).norm()
