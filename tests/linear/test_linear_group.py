"""functional.lora_linear_group against lora_linear for each member, and against float64."""

import itertools

import pytest
import torch
import torch.nn.functional as F

import lora_fast as lf
from lora_fast.functional import LinearMember, lora_linear, lora_linear_group

D, DEVICE = 20, torch.device("cuda" if torch.cuda.is_available() else "cpu")
KINDS = (  # d_out, r, scaling, bias, dtype of the factors, dropout_p, seed
    (16, 4, 2.0, True, torch.float32, 0.0, None),
    (7, 1, -0.5, False, torch.bfloat16, 0.0, None),
    (16, 4, 2.0, True, torch.float32, 0.3, 11),
    (33, 9, 0.25, False, torch.float32, 0.3, 12),
    (16, 4, 1.0, True, torch.bfloat16, 0.0, None),
)


def members_of(kinds, dtype, device):
    torch.manual_seed(0)
    make = lambda *shape, dtype: torch.randn(*shape, device=device).to(dtype)
    members = []
    for d_out, r, scaling, bias, factor, dropout_p, seed in kinds:
        factor = dtype if dtype is torch.float64 else factor
        a, b = make(r, D, dtype=factor).requires_grad_(), make(d_out, r, dtype=factor).requires_grad_()
        vector = make(d_out, dtype=dtype).requires_grad_() if bias else None
        members.append(LinearMember(make(d_out, D, dtype=dtype), vector, a, b, scaling, dropout_p, seed))
    return members


def leaves(x, members):
    return [x, *(t for m in members for t in m[1:4] if t is not None)]


@pytest.fixture(params=["torch", "triton"])
def backend(request):
    with lf.set_backend(request.param):
        yield request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("count", [1, 3, 5])
def test_members_are_single_layers(backend, dtype, count):
    members = members_of(KINDS[:count], dtype, DEVICE)
    x = torch.randn(3, 4, D, device=DEVICE).to(dtype).requires_grad_()
    dys = [torch.randn(3, 4, len(m.weight), device=DEVICE).to(dtype) for m in members]
    ys = lora_linear_group(x, members)
    grads = torch.autograd.grad(ys, leaves(x, members), dys)
    singles = [lora_linear(x, *m) for m in members]
    expected = torch.autograd.grad(singles, leaves(x, members), dys)
    same = torch.equal if backend == "torch" else lambda a, b: torch.allclose(a, b, rtol=1e-2, atol=1e-5)
    assert all(map(same, ys, singles)) and all(map(same, grads[1:], expected[1:]))
    assert all(g.dtype is t.dtype for g, t in zip(grads, leaves(x, members), strict=True))
    wide = [F.linear(dy.double(), m.weight.double().T) for dy, m in zip(dys, members, strict=True)]
    scale = sum(part.abs() for part in wide).max()
    # Each member's part of dx may be rounded once, and its dS, whose share is of this size, too.
    assert (grads[0].double() - expected[0].double()).abs().max() <= 3 * count * torch.finfo(dtype).eps * scale


@pytest.mark.parametrize("used", [(0,), (1, 2), (0, 1, 2)], ids=str)
@pytest.mark.parametrize("frozen", [(), (0,), (0, 1, 2)], ids=str)
def test_gradients_of_some_members_are_autograds(used, frozen):
    members = members_of([kind[:5] + (0.0, None) for kind in KINDS[:3]], torch.float64, "cpu")
    for i in frozen:
        members[i].lora_A.requires_grad_(False)
    x = torch.randn(4, D, dtype=torch.float64, requires_grad=True)
    ys = lora_linear_group(x, members)
    wanted = [t for t in leaves(x, members) if t.requires_grad]
    loss = lambda ys: sum((ys[i].square().sum() for i in used), torch.zeros((), dtype=torch.float64))
    got = torch.autograd.grad(loss(ys), wanted, allow_unused=True)
    exact = [F.linear(x, m.weight, m.bias) + F.linear(F.linear(x, m.lora_A), m.lora_B) * m.scaling for m in members]
    expected = torch.autograd.grad(loss(exact), wanted, allow_unused=True)
    for g, e in zip(got, expected, strict=True):
        assert (g is None) == (e is None)
        if e is not None:
            torch.testing.assert_close(g, e, rtol=1e-12, atol=1e-12)


def test_what_backward_does_not_read_may_change():
    members = members_of(KINDS[:1] * 2, torch.float64, "cpu")
    for m in members:
        m.lora_A.requires_grad_(False)
    x = torch.randn(4, D, dtype=torch.float64)
    ys = lora_linear_group(x, members)
    x.zero_()
    with torch.no_grad():
        members[0].lora_A.zero_()
        members[0].weight.zero_()
    (db,) = torch.autograd.grad(ys[0].sum(), [members[0].lora_B])
    assert db.abs().sum() > 0


def test_no_gradients_save_nothing():
    members = members_of(KINDS[:3], torch.float32, "cpu")
    x = torch.randn(4, D, requires_grad=True)
    with torch.no_grad():
        ys = lora_linear_group(x, members)
    with torch.inference_mode():
        others = lora_linear_group(x, members)
    assert all(y.grad_fn is None for y in ys) and all(map(torch.equal, ys, others))


def test_compiled_and_transformed_calls_compute_each_member():
    members = members_of(KINDS[:2], torch.float32, "cpu")
    members = [
        m._replace(bias=None, lora_A=m.lora_A.detach().float(), lora_B=m.lora_B.detach().float()) for m in members
    ]
    x = torch.randn(4, D)
    expected = lora_linear_group(x, members)
    compiled = torch.compile(lambda x: lora_linear_group(x, members), backend="eager", fullgraph=True)(x)
    mapped = torch.func.vmap(lambda row: lora_linear_group(row, members))(x)
    for ys in (compiled, mapped):
        assert all(torch.allclose(y, e, rtol=1e-5, atol=1e-6) for y, e in zip(ys, expected, strict=True))


GOOD = members_of(KINDS[:2], torch.float32, "cpu")
BAD = {
    "members": ([], "at least one member"),
    "members[1]": ([GOOD[0], GOOD[0][:3]], "lora_linear's arguments"),
    "members[0]": ([torch.zeros(2)], "lora_linear's arguments"),
    "members[1].lora_A": ([GOOD[0], GOOD[0]._replace(lora_A=torch.zeros(4, 3))], "shape"),
    "members[1].weight": (
        [GOOD[0], GOOD[0]._replace(weight=torch.zeros(16, D, requires_grad=True))],
        "requires_grad|computed",
    ),
    "members[0].scaling": ([GOOD[0]._replace(scaling=float("nan"))], "finite"),
    "seed": ([GOOD[0]._replace(dropout_p=0.5, seed=-1)], "2\\*\\*62"),
}


@pytest.mark.parametrize("argument", BAD)
def test_bad_members_are_named(argument):
    members, text = BAD[argument]
    with pytest.raises(lf.ArgumentError, match=text) as raised:
        lora_linear_group(torch.zeros(2, D), members)
    assert str(raised.value).startswith(argument)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
def test_the_order_of_backward_does_not_matter(order):
    """dx is summed in the members' order, whichever of their results is used first."""
    members = members_of([kind[:5] + (0.0, None) for kind in KINDS[:3]], torch.float32, "cpu")
    x = torch.randn(4, D, requires_grad=True)
    grads = []
    for turn in (range(3), order):
        ys = lora_linear_group(x, members)
        grads.append(torch.autograd.grad(sum(ys[i].square().sum() for i in turn), x)[0])
    assert torch.equal(*grads)
