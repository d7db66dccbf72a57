"""The public functions of the adapter step on both backends: lists of mixed shapes, ranks and layouts against the same
formula in float64, inputs that stay unchanged, arguments that are refused."""

import pytest
import torch
from budget import check, error
from method_runs import layer_with_gradients

from lora_fast import functional as F
from lora_fast.backend import set_backend
from lora_fast.checks import ArgumentError

pytestmark = pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")  # numpy's, for a pair of zeros
SHAPES = [(24, 40, 4), (9, 50, 4), (17, 33, 3), (24, 40, 4)]  # d_out, d_in, r
FLOAT32 = torch.float32
backends = pytest.mark.parametrize("backend", ["torch", "triton"])


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def lists(strided=True):
    """Returns a, b, da, db; with ``strided`` the second a is a transposed view."""
    a, b = ([randn(*shape, seed=i) for i, shape in enumerate(shapes)] for shapes in _both())
    da, db = ([randn(*shape, seed=i + 10) for i, shape in enumerate(shapes)] for shapes in _both())
    if strided:
        a[1] = a[1].T.contiguous().T
    return a, b, da, db


def _both():
    return [(r, d_in) for _, d_in, r in SHAPES], [(d_out, r) for d_out, _, r in SHAPES]


def against_float64(function, *arguments, names=("result",)):
    """Checks every result against the same function in float64 on the torch backend, by its error in float32 there."""
    wide = [[x.double() for x in value] if isinstance(value, list) else value for value in arguments]
    got = function(*arguments)
    with set_backend("torch"):
        exact, eager = function(*wide), function(*arguments)
    got, exact, eager = (x if isinstance(x, tuple) else (x,) for x in (got, exact, eager))
    for name, *lists_of_name in zip(names, got, exact, eager, strict=True):
        for i, (x, right, plain) in enumerate(zip(*lists_of_name, strict=True)):
            check(f"{name}[{i}]", x, right.double(), error(plain, right.double()), FLOAT32)


@backends
def test_gram_matches_float64(backend):
    a, b, *_ = lists()
    with set_backend(backend):
        against_float64(lambda x: F.gram(x, 1), a)
        against_float64(lambda x: F.gram(x, 0), b)
        assert F.gram([], 0) == []


@backends
@pytest.mark.parametrize("solver", ["nnls", "paper", "column", "scalar"])
def test_scalora_scaling_matches_float64(backend, solver):
    with set_backend(backend):
        scaling = lambda a, b, da, db: F.scalora_scaling(a, b, da, db, 2.0, 30.0, solver)
        against_float64(scaling, *lists(), names=("alpha", "beta", "info"))


@backends
@pytest.mark.parametrize("gauge", ["symmetric", "svd_signed"])
def test_hyperbalance_matches_float64(backend, gauge):
    a, b, *_ = lists()
    before = [x.clone() for x in (*a, *b)]
    with set_backend(backend):
        against_float64(lambda a, b: F.hyperbalance(a, b, gauge), a, b, names=("a", "b"))
    assert all(torch.equal(x, y) for x, y in zip((*a, *b), before, strict=True)), "the inputs change"


@backends
def test_spd_solve_and_small_inverse_match_float64(backend):
    root = randn(5, 7, 7)
    spd, rhs = root @ root.mT + torch.eye(7), randn(5, 7, 3)
    skew = root - root.mT + 2 * torch.eye(7)
    with set_backend(backend):
        against_float64(lambda m, x: F.spd_solve(m[0], x[0], 0.5), [spd], [rhs], names=("x", "info"))
        against_float64(lambda m: F.small_inverse(m[0]), [skew])


@backends
def test_add_low_rank_matches_float64(backend):
    weight, a, b, scale = randn(9, 50, seed=3), randn(4, 50), randn(9, 4), randn(4)
    exact = weight.double() + (b.double() * scale.double()) @ a.double()
    eager = error(weight + (b * scale) @ a, exact)
    with set_backend(backend):
        assert F.add_low_rank_(weight, a.T.contiguous().T, b, scale) is weight
    check("weight", weight, exact, eager, FLOAT32)


def step_case(dtype=FLOAT32):
    a, b, da, db = lists(strided=False)
    tensors, is_a = list(zip(b + a, db + da, strict=True)), [False] * len(b) + [True] * len(a)
    factors = [
        tuple(x.to(dtype) for x in (p, g, 0.1 * randn(*p.shape, seed=20), 0.01 * randn(*p.shape, seed=30).square()))
        for p, g in tensors
    ]
    n = len(factors)
    hyper = torch.tensor([[1e-2 * (i + 1), 0.9, 0.999, 1e-8, 0.1] for i in range(n)], dtype=torch.float64)
    work = F.StepWork(randn(n), randn(n, 4, 4), 0.5 + randn(n, 4).abs(), 0.5 + randn(n, 4, seed=1).abs(), True)
    return factors, is_a, hyper, torch.arange(n, dtype=FLOAT32), F.StepWork(*(w.to(dtype) for w in work[:4]), True)


@backends
def test_adapter_step_matches_float64(backend):
    runs = {}
    kinds = {"got": (FLOAT32, backend), "exact": (torch.float64, "torch"), "eager": (FLOAT32, "torch")}
    for name, (dtype, chosen) in kinds.items():
        factors, is_a, hyper, steps, work = step_case(dtype)
        with set_backend(chosen):
            grams = F.adapter_step_(factors, is_a, hyper, steps, work)
        runs[name] = [x for f in factors for x in f] + list(grams)
        assert torch.equal(steps, torch.arange(len(factors)) + 1.0)
    for i, (got, exact, eager) in enumerate(zip(*runs.values(), strict=True)):
        check(f"tensor {i}", got, exact.double(), error(eager, exact.double()), FLOAT32)


@backends
def test_adapter_step_without_work_agrees_with_torch_adamw(backend):
    factors, is_a, hyper, steps, _ = step_case()
    wanted = [torch.nn.Parameter(f[0].clone()) for f in factors]
    for p, (_, g, *_), (lr, *_, decay) in zip(wanted, factors, hyper.tolist(), strict=True):
        p.grad = g.clone()
        torch.optim.AdamW([p], lr=lr, weight_decay=decay).step()
    for _, _, m, v in factors:
        m.zero_(), v.zero_()
    with set_backend(backend):
        assert F.adapter_step_(factors, is_a, hyper, steps.zero_()) is None
    for (p, *_), want in zip(factors, wanted, strict=True):
        assert (p - want).norm() <= 8 * torch.finfo(FLOAT32).eps * want.norm()


@pytest.mark.parametrize("name", ["hyper", "steps", "additive", "matrices", "scale_p", "is_a", "factors[1][2]", "lone"])
def test_adapter_step_names_a_bad_argument_and_changes_nothing(name):
    factors, is_a, hyper, steps, work = step_case()
    before = [x.clone() for f in factors for x in f]
    if name == "factors[1][2]":
        factors[1] = (*factors[1][:2], factors[1][2].T, factors[1][3])
    elif name == "is_a":
        is_a = is_a[1:]
    elif name in ("hyper", "steps"):
        hyper, steps = (hyper[1:], steps) if name == "hyper" else (hyper, steps.double())
    else:
        work = work._replace(**({"scale_g": None} if name == "lone" else {name: getattr(work, name)[1:]}))
    expected = "scale_p, scale_g" if name == "lone" else name
    with pytest.raises(ValueError) as raised:
        F.adapter_step_(factors, is_a, hyper, steps, work)
    assert raised.value.argument == expected
    assert all(torch.equal(x, y) for x, y in zip((x for f in step_case()[0] for x in f), before, strict=True))


BEYOND_THE_KERNELS = {
    "gram": (lambda x: F.gram([x], 0), "rank"),
    "spd_solve": (lambda x: F.spd_solve(x[None, :257], x[None, :257]), "rank"),
    "small_inverse": (lambda x: F.small_inverse(x[None, :257]), "rank"),
    "scalora_scaling": (lambda x: F.scalora_scaling(*[x[:129].T[:129], x[:129, :129]] * 2, 1.0, 1.0), "rank"),
    "add_low_rank_": (lambda x: F.add_low_rank_(x.T, x[:2, :300], x[:257, :2], 1.0), "weight"),
    "adapter_step_": (lambda x: adapter_step_on(x.T), "factors[0][0]"),
    "steps": (lambda x: adapter_step_on(x[:4, :2].contiguous(), torch.zeros(4)[::2]), "steps"),
}


def adapter_step_on(x, steps=None):
    steps = torch.zeros(2) if steps is None else steps
    return F.adapter_step_([(x, x, x, x)] * 2, [False] * 2, torch.ones(2, 5, dtype=torch.float64), steps)


@pytest.mark.parametrize("call, argument", BEYOND_THE_KERNELS.values(), ids=BEYOND_THE_KERNELS)
def test_triton_backend_names_what_its_kernels_cannot_take(call, argument):
    with set_backend("triton"), pytest.raises(ValueError) as raised:
        call(torch.zeros(300, 257))
    assert raised.value.argument == argument


def test_lists_give_the_results_of_their_pairs():
    layers = [
        layer_with_gradients(0),
        layer_with_gradients(1, r=3),
        layer_with_gradients(2),
        layer_with_gradients(3, r=1, d_in=5),
    ]
    lists = [[x[0].a for x in layers], [x[0].b for x in layers], [x[2] for x in layers], [x[3] for x in layers]]
    alpha, beta, _ = F.scalora_scaling(*lists, 2.0, 3.0)
    balanced = F.hyperbalance(*lists[:2])
    grams = F.gram(lists[0], dim=1)
    for i, (a, b, da, db) in enumerate(zip(*lists, strict=True)):
        torch.testing.assert_close(
            torch.cat(F.scalora_scaling(a, b, da, db, 2.0, 3.0)[:2]), torch.cat([alpha[i], beta[i]])
        )
        torch.testing.assert_close(F.hyperbalance(a, b)[0], balanced[0][i])
        torch.testing.assert_close(grams[i], a @ a.T)
    torch.testing.assert_close(F.gram(lists[1], dim=0)[1], lists[1][1].T @ lists[1][1])


@pytest.mark.parametrize(
    "call, argument",
    [
        (lambda: F.gram([torch.ones(2)], 1), "tensors"),
        (lambda: F.gram([torch.ones(2, 2)], 2), "dim"),
        (lambda: F.spd_solve(torch.ones(2, 3), torch.ones(2, 3, 1)), "matrices"),
        (lambda: F.spd_solve(torch.ones(2, 3, 3), torch.ones(2, 4, 1)), "rhs"),
        (lambda: F.spd_solve(torch.ones(2, 3, 3), torch.ones(2, 3, 1), -1.0), "damping"),
        (lambda: F.hyperbalance(torch.ones(2, 3), torch.ones(4, 3)), "b"),
        (lambda: F.hyperbalance(torch.ones(2, 3), torch.ones(4, 2), "polar"), "gauge"),
        (lambda: F.scalora_scaling(*[torch.ones(2, 2)] * 4, 1.0, 0.0), "kappa"),
        (lambda: F.scalora_scaling(*[torch.ones(2, 2)] * 3, torch.ones(3, 2), 1.0, 1.0), "db"),
        (lambda: F.add_low_rank_(torch.ones(3, 3), torch.ones(2, 3), torch.ones(4, 2), 1.0), "weight"),
        (
            lambda: F.add_low_rank_(torch.ones(4, 3, dtype=torch.int8), torch.ones(2, 3), torch.ones(4, 2), 1.0),
            "weight",
        ),
    ],
)
def test_functions_name_the_argument_that_does_not_fit(call, argument):
    with pytest.raises(ArgumentError, match=rf"^{argument}(\[0\])?: expected"):
        call()
