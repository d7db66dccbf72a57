"""functional.cayley and the scales that go with it: gradients, orthogonality, the error budget, what is kept."""

from contextlib import nullcontext

import pytest
import torch
from budget import check, error
from exact_cayley import KINDS, exact_cayley, extreme_parameters
from torch._dynamo import compiled_autograd

import lora_fast as lf
from lora_fast.functional import cayley
from lora_fast.ops import cayley as module
from lora_fast.ops.cayley import Free, factors
from lora_fast.ops.reference import cayley as reference

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPES = [(7, 3, 4), (5, 3, 2), (6, 2, 5), (3, 3, 9), (4, 1, 3), (7, 3, 4)]  # d_in, r, d_out


def pairs(dtype=torch.float64, shapes=SHAPES, skew=1.0, seed=0) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """free_a, whose entries' skew part is up to ``skew``, and free_b."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *size: torch.randn(*size, generator=generator, dtype=torch.float64)
    free_a, free_b = [], []
    for d_in, r, d_out in shapes:
        a = draw(r, d_in) / d_in**0.5
        a[:, :r] = skew / 2 * (2 * torch.rand(r, r, generator=generator, dtype=torch.float64) - 1)
        free_a.append(a.to(DEVICE, dtype).requires_grad_())
        free_b.append((draw(d_out, r) / d_out**0.5).to(DEVICE, dtype).requires_grad_())
    return free_a, free_b


def flat(lists) -> tuple[torch.Tensor, ...]:
    return tuple(x for xs in lists for x in xs)


def papers_formula(a, b):
    """The paper's formula, differentiable, in its arguments' dtype."""
    r = len(a)
    a1, a2 = a[:, :r], a[:, r:]
    eye = torch.eye(r, dtype=a.dtype, device=a.device)
    inverse = torch.linalg.inv(eye + a1.T - a1 + a2 @ a2.T + b.T @ b)
    return torch.cat([2 * inverse.T - eye, -2 * inverse.T @ a2], 1), -2 * b @ inverse


def test_cayley_passes_gradcheck():
    free_a, free_b = pairs()
    call = lambda *t: flat(cayley(list(t[: len(SHAPES)]), list(t[len(SHAPES) :])))
    with lf.set_backend("torch"):
        assert torch.autograd.gradcheck(call, free_a + free_b)


def test_cayley_with_scales_passes_gradcheck():
    """Spectral (power 0), Frobenius (1/2) and nuclear (1) bounds in one node."""
    free_a, free_b = pairs()
    n = len(SHAPES)
    scale = [torch.randn(r, dtype=torch.float64, device=DEVICE, requires_grad=True) for _, r, _ in SHAPES]
    bounds, powers = [0.5, 1.0, 1.5, 2.0, 2.5, 3.0], [0.0, 0.5, 1.0] * 2
    call = lambda *t: flat(factors(Free(list(t[:n]), list(t[n : 2 * n]), list(t[2 * n :]), bounds, powers)))
    with lf.set_backend("torch"):
        assert torch.autograd.gradcheck(call, free_a + free_b + scale)


def test_cayley_is_the_formula():
    free_a, free_b = pairs(skew=10.0)
    for a, b, made_a, made_b in zip(free_a, free_b, *cayley(free_a, free_b), strict=True):
        torch.testing.assert_close((made_a, made_b), papers_formula(a, b))
    torch.testing.assert_close(cayley(free_a[0], free_b[0]), papers_formula(free_a[0], free_b[0]))


def off_identity(a, b) -> torch.Tensor:
    """‖a aᵀ + bᵀb − I‖₁ over 12 r ε of float32, of stacked pairs."""
    a, b = a.double(), b.double()
    r = a.shape[1]
    off = a @ a.mT + b.mT @ b - torch.eye(r, device=a.device)
    return off.abs().sum(-2).amax(-1) / (12 * r * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("r", [1, 2, 3, 5, 8, 16])
@pytest.mark.parametrize("d_in, d_out", [(0, 9), (5, 3), (40, 24)], ids=["square", "small", "wide"])
def test_result_is_orthogonal_in_float32(r, d_in, d_out):
    """140 random pairs of each of four skew parts a case, 10,080 in all."""
    for seed, skew in enumerate((0.1, 1.0, 10.0, 100.0)):
        free_a, free_b = pairs(torch.float32, [(r + d_in, r, d_out)] * 140, skew, seed)
        assert off_identity(*map(torch.stack, cayley(free_a, free_b))).max() <= 1


def test_result_is_orthogonal_with_nearly_parallel_rows():
    """Parameters ten times the usual, their rows alike in nine tenths: M's smallest eigenvalue is lost in float32."""
    free_a, free_b = (torch.stack(xs) for xs in pairs(torch.float32, [(40, 8, 24)] * 200))
    free_a = 10 * (0.1 * free_a + 0.9 * free_a[:, :1])
    free_b = 10 * (0.1 * free_b + 0.9 * free_b[..., :1])
    assert off_identity(*map(torch.stack, cayley(list(free_a), list(free_b)))).max() <= 1


@pytest.mark.parametrize("r, d_in, d_out", [(1, 64, 48), (4, 64, 48), (16, 16, 48), (33, 64, 48), (80, 200, 100)])
@pytest.mark.parametrize("kind", KINDS)
def test_parameters_of_ten_thousand_keep_values_and_gradients(kind, r, d_in, d_out):
    """Against a float64 transform without Grams: the singular values of 2 b a are at most 1, the values within 1e-3,
    and the gradients within half a percent (in float32 they would be off by many times their size)."""
    free = [x.to(DEVICE).requires_grad_() for x in extreme_parameters(kind, 1e4, r, d_in, d_out)]
    a, b = cayley(*free)
    assert torch.linalg.matrix_norm(2 * (b.double() @ a.double()), 2) <= 1 + 1e-6
    exact_free = [x.detach().double().requires_grad_() for x in free]
    exact_a, exact_b, _ = exact_cayley(*exact_free)
    assert torch.linalg.matrix_norm(2 * (b @ a - exact_b @ exact_a), 2) <= 1e-3
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(x.shape, generator=generator).to(DEVICE) for x in (a, b)]
    exact = torch.autograd.grad((exact_a, exact_b), exact_free, [x.double() for x in grads])
    for ours, true in zip(torch.autograd.grad((a, b), free, grads), exact, strict=True):
        assert error(ours, true) <= 5e-3


@pytest.mark.parametrize("kind", KINDS)
def test_ordinary_parameters_keep_the_gradients_to_float32(kind):
    """Entries of up to 10, as large as training makes them."""
    free = [x.to(DEVICE).requires_grad_() for x in extreme_parameters(kind, 3.0, 16, 64, 48)]
    results = cayley(*free)
    exact_free = [x.detach().double().requires_grad_() for x in free]
    exact = exact_cayley(*exact_free)[:2]
    directions = [x.detach().sin() for x in results]
    grads = torch.autograd.grad(results, free, directions)
    exact_grads = torch.autograd.grad(exact, exact_free, [x.double() for x in directions])
    for ours, true in zip((*results, *grads), (*exact, *exact_grads), strict=True):
        assert error(ours, true) <= torch.finfo(torch.float32).eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("skew", [1.0, 30.0])
def test_cayley_is_within_the_error_budget(skew, dtype):
    """Values and gradients against float64 on the same inputs; eager is autograd through the paper's formula, in
    float32 for bfloat16 parameters as here."""
    shapes = [(40, 5, 24), (24, 16, 40), (33, 1, 7), (9, 9, 20), (200, 32, 100)]

    def run(kind, call):
        free_a, free_b = pairs(dtype, shapes, skew)
        free_a, free_b = ([x.detach().to(kind or dtype).requires_grad_() for x in xs] for xs in (free_a, free_b))
        made_a, made_b = call(free_a, free_b)
        for x in made_a + made_b:
            x.backward(torch.cos(torch.arange(x.numel())).view_as(x).to(x), retain_graph=True)
        return made_a, made_b, [x.grad for x in free_a], [x.grad for x in free_b]

    looped = lambda a, b: tuple(map(list, zip(*(papers_formula(x, y) for x, y in zip(a, b, strict=True)), strict=True)))
    got, eager, exact = run(None, cayley), run(torch.float32, looped), run(torch.float64, looped)
    for name, ours, theirs, true in zip(("a", "b", "d free_a", "d free_b"), got, eager, exact, strict=True):
        for i, shape in enumerate(shapes):
            low = name.startswith("d")
            assert ours[i].dtype == (dtype if low else torch.float32)
            allowed = error(theirs[i].to(ours[i].dtype), true[i])
            check(f"{name} of {shape}", ours[i], true[i], allowed, dtype if low else torch.float32)


def test_node_keeps_wi_alone():
    free_a, free_b = pairs(torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        a, _ = cayley(free_a, free_b)
    assert not kept
    node = a[0].grad_fn
    assert [tuple(x.shape) for x in node.inverses] == [(r, r) for _, r, _ in SHAPES] and not node.scales


def test_all_pairs_share_one_node():
    made_a, made_b = cayley(*pairs())
    assert len({x.grad_fn for x in made_a + made_b}) == 1


def test_pairs_without_a_gradient_get_none(monkeypatch):
    """A pair that no loss depends on costs nothing backward, and its parameters' gradients stay None."""
    seen = []
    twin = reference.cayley_backward
    monkeypatch.setattr(reference, "cayley_backward", lambda *args: seen.append(len(args[0])) or twin(*args))
    free_a, free_b = pairs()
    made_a, made_b = cayley(free_a, free_b)
    (made_a[0].sum() + made_b[2].sum()).backward()
    assert seen == [2] and [x.grad is not None for x in free_a] == [True, False, True, False, False, False]
    expected = [torch.autograd.grad(papers_formula(free_a[0], free_b[0])[0].sum(), (free_a[0], free_b[0]))]
    torch.testing.assert_close((free_a[0].grad, free_b[0].grad), expected[0])


@pytest.mark.parametrize("parameter", [0, 1], ids=["free_a", "free_b"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_inf_stay_in_their_pair(bad, parameter):
    lists = pairs(torch.float32)
    clean = cayley(*lists)
    with torch.no_grad():
        lists[parameter][1][-1, -1] = bad
    for results, before in zip(cayley(*lists), clean, strict=True):
        for i in range(len(SHAPES)):
            assert i == 1 or torch.equal(results[i], before[i])
    broken = torch.cat([results[1].flatten() for results in cayley(*lists)])
    assert broken.isnan().all() if bad != bad else not broken.isfinite().all()


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0], ids=["spectral", "frobenius", "nuclear"])
def test_gradients_are_differentiable_again(power):
    make = lambda *shape: torch.randn(shape, dtype=torch.float64, device=DEVICE, requires_grad=True)
    leaves = make(2, 4), make(3, 2), make(2)
    call = lambda a, b, scale: flat(factors(Free([a], [b], [scale], [1.5], [power])))
    with lf.set_backend("torch"):
        assert torch.autograd.gradgradcheck(call, leaves)


def test_hooks_of_a_parameter_see_its_gradient_once():
    free_a, free_b = (xs[0] for xs in pairs())
    seen = []
    free_a.register_hook(seen.append)
    a, _ = cayley(free_a, free_b)
    (gradient,) = torch.autograd.grad(a.sin().sum(), free_a, create_graph=True)
    assert [g is gradient for g in seen] == [True]


def test_in_place_change_before_backward_is_refused():
    free_a, free_b = pairs()
    a, _ = cayley(free_a, free_b)
    with torch.no_grad():
        free_b[3].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        a[0].sum().backward()


def test_autocast_does_not_change_the_result():
    free_a, free_b = pairs(torch.float32)
    expected = cayley(free_a, free_b)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        results = cayley(free_a, free_b)
    assert all(torch.equal(x, y) for xs, ys in zip(results, expected, strict=True) for x, y in zip(xs, ys, strict=True))


def test_cayley_compiles_as_one_graph():
    free_a, free_b = pairs(torch.float32)
    compiled = torch.compile(lambda a, b: cayley(a, b), fullgraph=True, backend="aot_eager")

    def run(call):
        results = flat(call(free_a, free_b))
        sum(x.square().mul(0.5 + i).sum() for i, x in enumerate(results)).backward()
        grads = [x.grad for x in free_a + free_b]
        for x in free_a + free_b:
            x.grad = None
        return [*results, *grads]

    assert all(torch.equal(x, y) for x, y in zip(run(compiled), run(cayley), strict=True))


@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled"])
def test_ops_pass_opcheck(scaled):
    free_a, free_b = pairs(torch.float32, SHAPES[:3])
    scale = [x.detach()[:, 0].clone().requires_grad_() for x in free_a] if scaled else []
    numbers = ([0.5, 1.0, 2.0], [0.0, 0.5, 1.0]) if scaled else ([], [])
    torch.library.opcheck(module.cayley_op, (free_a, free_b, scale, *numbers, False))


# ── bad input ────────────────────────────────────────────────────────────────────────────────────────────────────────

BAD = {
    "r above d_in": ("free_a[0]", [torch.zeros(3, 2)], [torch.zeros(4, 3)]),
    "no rank": ("free_a[0]", [torch.zeros(0, 2)], [torch.zeros(4, 0)]),
    "r above 256": ("free_a[0]", [torch.zeros(257, 300)], [torch.zeros(4, 257)]),
    "integers": ("free_a[0]", [torch.zeros(1, 2, dtype=torch.int64)], [torch.zeros(4, 1)]),
    "vector": ("free_b[0]", [torch.zeros(1, 2)], [torch.zeros(4)]),
    "other rank": ("free_b[1]", [torch.zeros(1, 2)] * 2, [torch.zeros(4, 1), torch.zeros(4, 2)]),
    "other dtype": ("free_b[0]", [torch.zeros(1, 2)], [torch.zeros(4, 1).half()]),
    "other device": ("free_b[0]", [torch.zeros(1, 2)], [torch.zeros(4, 1, device="meta")]),
    "lengths": ("free_b", [torch.zeros(1, 2)] * 2, [torch.zeros(4, 1)]),
    "empty": ("free_b", [], []),
    "no tensor": ("free_a[0]", ["a"], [torch.zeros(4, 1)]),
}


@pytest.mark.parametrize("case", BAD)
def test_cayley_refuses_bad_arguments(case):
    argument, free_a, free_b = BAD[case]
    with pytest.raises(lf.ArgumentError) as raised:
        cayley(free_a, free_b)
    assert raised.value.argument == argument


# ── graphs ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_ops_stay_outside_cuda_graph_trees():
    """The kernels keep tables between calls, which inductor's CUDA graph trees do not allow in a graph's memory."""
    for op in (module.cayley_op, module.cayley_backward_op):
        assert torch.Tag.cudagraph_unsafe in op._opoverload.tags


@pytest.mark.parametrize("backend", [pytest.param("torch", marks=pytest.mark.budget), "triton"])
def test_compiled_autograd_gives_eagers_gradients(backend):
    results = []
    torch._dynamo.reset()
    for compiled in (False, True):
        free_a, free_b = pairs(torch.float32)
        with lf.set_backend(backend):
            for _ in range(2):
                a, b = factors(Free(free_a, free_b))
                loss = sum((b @ a).square().sum() for a, b in zip(a, b, strict=True))
                context = compiled_autograd._enable(torch.compile(backend="eager")) if compiled else nullcontext()
                with context:
                    loss.backward()
        results.append([x.grad for x in free_a + free_b])
    assert all(torch.equal(g, h) for g, h in zip(*results, strict=True))


def test_changed_parameter_raises_under_compiled_autograd_as_well():
    free_a, free_b = pairs(torch.float32)
    a, _ = factors(Free(free_a, free_b))
    with torch.no_grad():
        free_a[0].add_(1)
    under_compiled_autograd = compiled_autograd._enable(torch.compile(backend="eager"))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"), under_compiled_autograd:
        a[0].sum().backward()
