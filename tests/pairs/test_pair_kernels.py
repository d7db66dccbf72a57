"""The kernels gram, step, transform and merge against float64, through Triton's interpreter (natively on a CUDA
machine): mixed shapes and ranks, poisoned buffers, determinism, exact traffic, launches that do not grow with pairs."""

import itertools

import pytest
import torch
from budget import check, error
from launching import DEVICE, poisoned_empty, randn, size
from triton.runtime.interpreter import InterpretedFunction

from lora_fast.kernels import limits
from lora_fast.kernels.inspection import interpreter
from lora_fast.kernels.linalg import spd
from lora_fast.kernels.pairs import adamw, add_low_rank, gram, transform

pytestmark = pytest.mark.gpu

FLOAT32, FLOAT16, BFLOAT16 = torch.float32, torch.float16, torch.bfloat16
ALL = gram.Grams._fields
MIXED = [(4, 33, 70), (7, 64, 5), (16, 2300, 1), (1, 1, 9), (16, 512, 4096), (3, 8, 16)]  # r, d_in, d_out
DEEP = [(16, 5000, 4100)]  # several chunks each way
RANKS = [1, 8, 17, 33, 64, 100, 256]


def pairs(shapes, dtype, seed=0):
    """Returns a, b, da, db: lists of one tensor per pair."""
    a = [randn(r, d_in, seed=seed + i, dtype=dtype) for i, (r, d_in, _) in enumerate(shapes)]
    b = [randn(d_out, r, seed=seed + i + 100, dtype=dtype) for i, (r, _, d_out) in enumerate(shapes)]
    da = [randn(*t.shape, seed=seed + i + 200, dtype=dtype) for i, t in enumerate(a)]
    db = [randn(*t.shape, seed=seed + i + 300, dtype=dtype) for i, t in enumerate(b)]
    return a, b, da, db


def check_padded(name, got, exact, eager, computed_in=FLOAT32):
    """Checks that a padded (R, R) result is within the budget in its own rank and zero beyond."""
    r = exact.shape[0]
    check(name, got[:r, :r], exact, error(eager, exact), computed_in)
    assert got[r:].eq(0).all() and got[:, r:].eq(0).all(), f"{name}: not zero beyond rank {r}"


def gram_formulas(a, b, da, db):
    return {"ka": a @ a.T, "kb": b.T @ b, "kp": da @ da.T, "kq": db.T @ db, "k": da @ a.T}


def check_grams(shapes, dtype, wanted=ALL):
    tensors = pairs(shapes, dtype)
    with poisoned_empty():
        got = gram.gram(*tensors, wanted)
    for i, pair in enumerate(zip(*tensors, strict=True)):
        exact = gram_formulas(*(t.double() for t in pair))
        eager = gram_formulas(*(t.float() for t in pair))
        for name in wanted:
            check_padded(f"{name} of pair {i}", getattr(got, name)[i], exact[name], eager[name])
    for name in set(ALL) - set(wanted):
        assert getattr(got, name) is None


@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT16, BFLOAT16])
def test_gram_matches_float64_for_mixed_pairs(dtype):
    check_grams(MIXED, dtype)


@pytest.mark.parametrize("r", RANKS)
def test_gram_matches_float64_at_every_rank(r):
    check_grams([(r, 70, 33), (max(1, r // 2), 16, 128)], FLOAT32)


@pytest.mark.parametrize("wanted", [("ka",), ("kb",), ("kp", "k"), ("kq", "kb"), ("k", "ka", "kb")], ids="-".join)
def test_gram_computes_only_the_wanted_grams(wanted):
    check_grams([(5, 3000, 2100), (4, 9, 8)], FLOAT32, wanted)


def test_gram_matches_float64_for_mixed_dtypes():
    """Factors and gradients have two dtypes each, which takes one launch for each combination."""
    a, b, da, db = pairs([(4, 40, 24), (8, 2200, 16)], FLOAT32)
    a[1], da[1], b[0] = a[1].half(), da[1].half(), b[0].bfloat16()
    got = gram.gram(a, b, da, db, ALL)
    for i, pair in enumerate(zip(a, b, da, db, strict=True)):
        exact, eager = (gram_formulas(*(t.to(d) for t in pair)) for d in (torch.float64, FLOAT32))
        for name in ALL:
            check_padded(f"{name} of pair {i}", getattr(got, name)[i], exact[name], eager[name])


def test_gram_of_no_pairs_and_of_empty_factors():
    assert gram.gram([], []).ka.shape == (0, 1, 1)
    empty = gram.gram([torch.empty(3, 0, device=DEVICE)], [torch.empty(0, 3, device=DEVICE)])
    assert empty.ka.eq(0).all() and empty.kb.eq(0).all()


def test_gram_keeps_a_nan_in_its_pair():
    a, b, da, db = pairs([(4, 2500, 16)] * 3, FLOAT32)
    clean = gram.gram(a, b, da, db, ALL)
    a[1][2, 2400] = float("nan")
    got = gram.gram(a, b, da, db, ALL)
    assert got.ka[1].isnan().any() and got.k[1].isnan().any()
    for name, pair in itertools.product(ALL, (0, 2)):
        assert torch.equal(getattr(got, name)[pair], getattr(clean, name)[pair])


@pytest.mark.parametrize(
    "bad, message", [("strided", "expected contiguous"), ("float64", "expected float16"), ("shape", "expected shape")]
)
def test_gram_names_a_bad_tensor(bad, message):
    a, b, da, db = pairs([(4, 16, 8)], FLOAT32)
    da[0] = {"strided": da[0].T.contiguous().T, "float64": da[0].double(), "shape": da[0][:, :8].contiguous()}[bad]
    with pytest.raises(AssertionError, match=message):
        gram.gram(a, b, da, db, ALL)


def test_gram_follows_moved_gradients():
    """Gradients are new tensors at every step, as after zero_grad(set_to_none=True)."""
    a, b, da, db = pairs([(4, 16, 8)], FLOAT32)
    for seed in range(5):
        da = [randn(*da[0].shape, seed=seed)]
        got = gram.gram(a, b, da, db, ("k",)).k[0]
        torch.testing.assert_close(got, da[0] @ a[0].T)


# ---- The step: AdamW and the operations around it


def step_case(ranks, dtype, seed=0, lengths=(70, 33, 600, 5, 1100), state=FLOAT32):
    """Returns factors (p, g, m, v) of alternating sides, and values for every argument of step_."""
    n, r_max = len(ranks), max(ranks)
    is_a = [i % 2 == 0 for i in range(n)]
    shapes = [(r, d) if side else (d, r) for r, d, side in zip(ranks, itertools.cycle(lengths), is_a, strict=False)]
    factors = []
    for i, shape in enumerate(shapes):
        p, g = randn(*shape, seed=seed + i, dtype=dtype), randn(*shape, seed=seed + i + 50, dtype=dtype)
        m = (0.1 * randn(*shape, seed=seed + i + 100)).to(state)
        v = (0.01 * randn(*shape, seed=seed + i + 150).square()).to(state)
        factors.append((p, g, m, v))
    hyper = torch.tensor([[1e-2 * (i + 1), 0.9, 0.999, 1e-8, 0.1 * i] for i in range(n)], dtype=torch.float64)
    extras = {
        "additive": randn(n, seed=seed + 1),
        "matrices": randn(n, r_max, r_max, seed=seed + 2) / r_max**0.5,
        "scale_p": 0.5 + randn(n, r_max, seed=seed + 3).abs(),
        "scale_g": 0.5 + randn(n, r_max, seed=seed + 4).abs(),
    }
    steps = torch.tensor([0.0, 1.0, 9.0, 999.0, 0.0])[:n] if n <= 5 else torch.arange(0.0, n)
    return factors, is_a, hyper.to(DEVICE), steps.to(DEVICE), extras


def step_formula(tensors, is_a, hyper, t, extras, dtype):
    """Returns the new p, m, v of one factor, computed in ``dtype``."""
    p, g, m, v = (x.to(dtype) for x in tensors)
    r = p.shape[0 if is_a else 1]
    c, matrix, d, e = (None if x is None else x.to(dtype) for x in extras)
    if c is not None:
        g = g + c * p
    if matrix is not None:
        g = matrix[:r, :r] @ g if is_a else g @ matrix[:r, :r]
    if d is not None:
        d, e = (x[:r, None] if is_a else x[:r] for x in (d, e))
        p, g, m, v = d * p, e * g, e * m, e * e * v
    lr, beta1, beta2, eps, decay = hyper
    m = m + (1 - beta1) * (g - m)
    v = beta2 * v + (1 - beta2) * g * g
    p = p * (1 - lr * decay) - lr / (1 - beta1**t) * m / (v.sqrt() / (1 - beta2**t) ** 0.5 + eps)
    return p, m, v


def check_step(ranks, dtype, on, want_gram, state=FLOAT32, lengths=(70, 33, 600, 5, 1100)):
    factors, is_a, hyper, steps, extras = step_case(ranks, dtype, state=state, lengths=lengths)
    before, taken = [tuple(t.clone() for t in tensors) for tensors in factors], steps.clone()
    extras = {name: value if name in on else None for name, value in extras.items()}
    with poisoned_empty():
        got_gram = adamw.step_(factors, is_a, hyper, steps, adamw.StepWork(**extras, gram=want_gram))
    assert torch.equal(steps, taken + 1)
    for i, tensors in enumerate(factors):
        factor_extras = [None if x is None else x[i] for x in extras.values()]
        arguments = before[i], is_a[i], hyper[i].tolist(), steps[i].item(), factor_extras
        exact, eager = step_formula(*arguments, torch.float64), step_formula(*arguments, FLOAT32)
        assert torch.equal(tensors[1], before[i][1]), "the gradient is only read"
        for name, got, right, plain in zip("pmv", (tensors[0], *tensors[2:]), exact, eager, strict=True):
            check(f"{name} of factor {i}", got, right, error(plain.to(got.dtype), right), got.dtype)
        if want_gram:
            p = tensors[0].double()
            right, plain = (x @ x.T if is_a[i] else x.T @ x for x in (p, p.float()))
            check_padded(f"gram of factor {i}", got_gram[i], right, plain)
    assert (got_gram is None) == (not want_gram)


EVERYTHING = ("additive", "matrices", "scale_p", "scale_g")
WORK = [(), ("additive",), ("matrices",), ("additive", "matrices"), ("scale_p", "scale_g"), EVERYTHING]


@pytest.mark.parametrize("want_gram", [False, True], ids=["", "gram"])
@pytest.mark.parametrize("on", WORK, ids=lambda on: "-".join(on) or "adamw")
def test_step_matches_float64(on, want_gram):
    check_step([4, 7, 16, 1, 3], FLOAT32, on, want_gram)


@pytest.mark.parametrize("dtype, state", [(FLOAT16, FLOAT32), (BFLOAT16, FLOAT32), (BFLOAT16, BFLOAT16)])
@pytest.mark.parametrize("on", [(), EVERYTHING], ids=["adamw", "everything"])
def test_step_matches_float64_in_16_bits(dtype, state, on):
    check_step([4, 7, 16, 1, 8], dtype, on, True, state)


@pytest.mark.parametrize("r", RANKS)
def test_step_matches_float64_at_every_rank(r):
    check_step([r, r, max(1, r // 2)], FLOAT32, EVERYTHING, True, lengths=(20, 33, 17))


def test_step_agrees_with_torch_adamw():
    """Ten steps are as close to those of torch.optim.AdamW in float64 as torch's own in float32."""
    shapes = [(16, 200), (300, 16)]
    start = [randn(*shape, seed=i) for i, shape in enumerate(shapes)]
    runs = {}
    for dtype in (torch.float64, FLOAT32):
        parameters = [torch.nn.Parameter(p.to(dtype, copy=True)) for p in start]
        optimizer = torch.optim.AdamW(parameters, lr=1e-2, betas=(0.9, 0.99), eps=1e-6, weight_decay=0.1)
        for t in range(10):
            for i, p in enumerate(parameters):
                p.grad = randn(*p.shape, seed=1000 * t + i).to(dtype)
            optimizer.step()
        runs[dtype] = [p.detach() for p in parameters]
    factors = [(p.clone(), torch.zeros_like(p), torch.zeros_like(p), torch.zeros_like(p)) for p in start]
    hyper = torch.tensor([[1e-2, 0.9, 0.99, 1e-6, 0.1]], dtype=torch.float64, device=DEVICE)
    steps = torch.zeros(2, device=DEVICE)
    for t in range(10):
        for i, tensors in enumerate(factors):
            tensors[1].copy_(randn(*tensors[1].shape, seed=1000 * t + i))
        adamw.step_(factors, [True, False], hyper, steps)
    for (p, *_), exact, eager in zip(factors, runs[torch.float64], runs[FLOAT32], strict=True):
        check("p", p, exact, error(eager, exact), FLOAT32)


@pytest.mark.parametrize("add", [False, True], ids=["", "add"])
@pytest.mark.parametrize("r, dtype", [(1, FLOAT32), (8, FLOAT16), (40, FLOAT32), (64, FLOAT16), (150, FLOAT32)])
def test_transform_matches_float64(r, dtype, add):
    factors, is_a, *_, extras = step_case([r, r, max(1, r - 3)], dtype)
    tensors, matrices = [f[0] for f in factors], extras["matrices"]
    before, versions = [t.clone() for t in tensors], [t._version for t in tensors]
    transform.transform_(tensors, is_a, matrices, add)
    for i, (p, old) in enumerate(zip(tensors, before, strict=True)):
        k = old.shape[0 if is_a[i] else 1]
        formula = lambda x, m, i=i, k=k: (m[i, :k, :k] @ x if is_a[i] else x @ m[i, :k, :k]) + x * add
        exact, eager = formula(old.double(), matrices.double()), formula(old.float(), matrices).to(dtype)
        check(f"factor {i}", p, exact, error(eager, exact), dtype)
    assert all(t._version > v for t, v in zip(tensors, versions, strict=True)), "the version counter does not change"


def test_step_and_transform_accept_no_factors():
    hyper, steps = torch.ones(1, 5, dtype=torch.float64, device=DEVICE), torch.ones(0, device=DEVICE)
    assert adamw.step_([], [], hyper, steps, adamw.StepWork(gram=True)).shape == (0, 1, 1)
    transform.transform_([], [], torch.empty(0, 1, 1, device=DEVICE))


@pytest.mark.parametrize("name", ["matrices", "scale_g", "additive", "hyper"])
def test_step_names_bad_work(name):
    factors, is_a, hyper, steps, extras = step_case([4, 4], FLOAT32)
    if name == "hyper":
        hyper = hyper.float()
    else:
        extras[name] = extras[name].repeat(2, *[1] * (extras[name].ndim - 1))
    with pytest.raises(AssertionError, match=name):
        adamw.step_(factors, is_a, hyper, steps, adamw.StepWork(**extras))


def test_same_inputs_give_the_same_bits():
    def run():
        factors, is_a, hyper, steps, extras = step_case([16, 16, 5], FLOAT32, lengths=(1500, 1100, 700))
        grams = adamw.step_(factors, is_a, hyper, steps, adamw.StepWork(**extras, gram=True))
        transform.transform_([f[0] for f in factors], is_a, extras["matrices"])
        five = gram.gram(*pairs(DEEP, FLOAT32), ALL)
        return [grams, *five, *(t for f in factors for t in f)]

    first = run()
    for _ in range(3):
        assert all(torch.equal(x, again) for x, again in zip(first, run(), strict=True))


# ---- The merge


def merge_case(shapes, dtype, adapter=FLOAT32):
    """Returns weights, a, b and scale of layers (r, d_out, d_in)."""
    weights = [randn(d_out, d_in, seed=i, dtype=dtype) for i, (_, d_out, d_in) in enumerate(shapes)]
    a = [randn(r, d_in, seed=i, dtype=adapter) for i, (r, _, d_in) in enumerate(shapes)]
    b = [randn(d_out, r, seed=i, dtype=adapter) for i, (r, d_out, _) in enumerate(shapes)]
    scale = 0.02 * randn(len(shapes), max(r for r, *_ in shapes))
    return weights, a, b, scale


def merge_formula(w, a, b, scale, dtype):
    return w.to(dtype) + (b.to(dtype) * scale[: a.shape[0]].to(dtype)) @ a.to(dtype)


LAYERS = [(4, 40, 24), (7, 1, 9), (3, 1030, 520), (1, 33, 1030)]


@pytest.mark.parametrize("rounding", limits.ROUNDINGS)
@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT16, BFLOAT16])
def test_merge_matches_float64_with_every_rounding(dtype, rounding):
    """Nearest is within the budget. Stochastic is one of the two neighbours. Compensated is nearest, and weight and
    residual keep the sum."""
    weights, a, b, scale = merge_case(LAYERS, dtype)
    before = [w.clone() for w in weights]
    residuals = [0.001 * w for w in weights] if rounding == "compensated" else None
    carried = [r.double() for r in residuals] if residuals else [0.0] * len(weights)
    add_low_rank.add_low_rank_(weights, a, b, scale, rounding, 11, residuals)
    for i, w in enumerate(weights):
        exact = merge_formula(before[i], a[i], b[i], scale[i], torch.float64)
        eager = merge_formula(before[i], a[i], b[i], scale[i], FLOAT32)
        if residuals and dtype != FLOAT32:
            exact, eager = exact + carried[i], eager + carried[i].float()
        if rounding != "stochastic" or dtype == FLOAT32:
            check(f"layer {i}", w, exact, error(eager.to(dtype), exact), dtype)
        spacing = exact.abs().clamp(min=2.0**-14) * torch.finfo(dtype).eps
        slack = exact.abs().amax() * 16 * torch.finfo(FLOAT32).eps
        assert ((w.double() - exact).abs() <= spacing + slack).all()
        if residuals and dtype != FLOAT32:
            total = w.double() + residuals[i].double()
            assert error(total, exact) <= torch.finfo(dtype).eps ** 2 + 4 * torch.finfo(FLOAT32).eps


@pytest.mark.parametrize("adapter", [FLOAT16, BFLOAT16])
@pytest.mark.parametrize("r", [1, 16, 17, 100])
def test_merge_matches_float64_at_every_rank(r, adapter):
    weights, a, b, scale = merge_case([(r, 50, 70), (max(1, r - 1), 20, 16)], FLOAT32, adapter)
    before = [w.clone() for w in weights]
    add_low_rank.add_low_rank_(weights, a, b, scale)
    for i, w in enumerate(weights):
        exact, eager = (merge_formula(before[i], a[i], b[i], scale[i], d) for d in (torch.float64, FLOAT32))
        check(f"layer {i}", w, exact, error(eager, exact), FLOAT32)


@pytest.mark.parametrize("dtype, start", [(BFLOAT16, 1.0), (FLOAT16, 1.0), (FLOAT16, 2.0**-15), (BFLOAT16, -3.0)])
def test_stochastic_rounding_has_the_exact_expectation(dtype, start):
    """Nearest loses a change of a tenth of the spacing; stochastic keeps its mean within 5 standard deviations."""
    spacing = torch.nextafter(torch.tensor(abs(start), dtype=dtype), torch.tensor(9.0, dtype=dtype)).item() - abs(start)
    a, b = [torch.ones(1, 512, device=DEVICE)], [torch.ones(256, 1, device=DEVICE)]
    scale = torch.full((1, 1), spacing / 10, device=DEVICE)
    moved = {}
    for rounding in ("nearest", "stochastic"):
        w = torch.full((256, 512), start, dtype=dtype, device=DEVICE)
        add_low_rank.add_low_rank_([w], a, b, scale, rounding, seed=3)
        moved[rounding] = (w.double() - start) / spacing
    assert moved["nearest"].eq(0).all()
    assert set(moved["stochastic"].unique().tolist()) == {0.0, 1.0}
    deviation = (0.1 * 0.9 / moved["stochastic"].numel()) ** 0.5
    assert abs(moved["stochastic"].mean().item() - 0.1) <= 5 * deviation


def test_stochastic_rounding_depends_on_seed_layer_and_element():
    """A seed gives the same bits as a number and in memory; another seed, layer or element gives other bits."""

    def run(seed):
        weights, a, b, scale = merge_case([(4, 64, 520)] * 2, BFLOAT16)
        weights[1], a[1], b[1], scale[1] = weights[0].clone(), a[0].clone(), b[0].clone(), scale[0]
        add_low_rank.add_low_rank_(weights, a, b, scale, "stochastic", seed)
        return weights

    first, again, other = run(7), run(torch.tensor(7, device=DEVICE)), run(8)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0]) and not torch.equal(first[0], first[1])


def test_merge_keeps_nan_and_inf():
    for dtype, rounding in itertools.product((BFLOAT16, FLOAT16), ("nearest", "stochastic")):
        weights, a, b, scale = merge_case([(2, 16, 16)], dtype)
        weights[0][0, :2] = torch.tensor([float("nan"), float("inf")])
        add_low_rank.add_low_rank_(weights, a, b, scale, rounding)
        assert weights[0][0, 0].isnan() and weights[0][0, 1].isinf() and weights[0].isfinite().sum() == 254


@pytest.mark.parametrize(
    "bad, message", [("rounding", "rounding"), ("tied", "weights: expected 2"), ("a", "layer 0"), ("scale", "scale")]
)
def test_merge_names_bad_arguments(bad, message):
    weights, a, b, scale = merge_case([(2, 16, 16)] * 2, BFLOAT16)
    weights = weights[:1] * 2 if bad == "tied" else weights
    a[0] = a[0][:, :8].contiguous() if bad == "a" else a[0]
    scale = scale[:1] if bad == "scale" else scale
    with pytest.raises(AssertionError, match=message):
        add_low_rank.add_low_rank_(weights, a, b, scale, "up" if bad == "rounding" else "nearest")


# ---- Counted by the interpreter

COUNTED = pytest.mark.skipif(DEVICE.type == "cuda", reason="counted by the interpreter")


def llama_pairs(r, dtype):
    """Returns the pairs of one layer: square, grouped-query, up and down projections; above rank 16 one wider pair."""
    shapes = [(r, 4096, 4096), (r, 4096, 1024), (r, 4096, 14336), (r, 14336, 4096)]
    return pairs(shapes if r <= 16 else [(r, 8192, 8192)], dtype)


@COUNTED
@pytest.mark.parametrize("r, dtype", [(16, FLOAT32), (16, BFLOAT16), (64, FLOAT32)])
def test_gram_traffic_is_minimal(r, dtype):
    tensors = llama_pairs(r, dtype)
    with interpreter.traffic() as counted:
        got = gram.gram(*tensors, ALL)
    minimum = size(*got, *(t for of_kind in tensors for t in of_kind))
    assert minimum <= counted.total <= 1.05 * minimum, f"{counted.total / minimum:.4f}"


@COUNTED
@pytest.mark.parametrize(
    "r, on, want_gram",
    [(16, (), False), (8, EVERYTHING, True), (16, EVERYTHING, True), (64, EVERYTHING, True)],
    ids=["16-adamw", "8-everything", "16-everything", "64-everything"],
)
def test_step_traffic_is_minimal(r, on, want_gram):
    """p, g, m, v are read once; p, m, v and the Grams are written once."""
    a, b, *_ = llama_pairs(r, FLOAT32)
    factors = [(t, t.clone(), t.clone(), t.abs()) for t in a + b]
    n = len(factors)
    extras = {"additive": (n,), "matrices": (n, r, r), "scale_p": (n, r), "scale_g": (n, r)}
    extras = {name: torch.ones(shape) for name, shape in extras.items() if name in on}
    hyper, steps = torch.full((n, 5), 0.5, dtype=torch.float64), torch.ones(n)
    with interpreter.traffic() as counted:
        is_a = [True] * len(a) + [False] * len(b)
        got = adamw.step_(factors, is_a, hyper, steps, adamw.StepWork(**extras, gram=want_gram))
    minimum = 7 * size(*a, *b) + size(*extras.values()) + (size(got) if want_gram else 0)
    assert minimum <= counted.total <= 1.05 * minimum, f"{counted.total / minimum:.4f}"


@COUNTED
def test_transform_traffic_is_minimal():
    a, b, *_ = llama_pairs(16, FLOAT32)
    matrices = torch.zeros(8, 16, 16)
    with interpreter.traffic() as counted:
        transform.transform_(a + b, [True] * 4 + [False] * 4, matrices)
    minimum = 2 * size(*a, *b) + size(matrices)
    assert minimum <= counted.total <= 1.05 * minimum, f"{counted.total / minimum:.4f}"


@COUNTED
@pytest.mark.parametrize("dtype, rounding, passes", [(BFLOAT16, "stochastic", 2), (BFLOAT16, "compensated", 4)])
def test_merge_traffic_is_minimal(dtype, rounding, passes):
    weights, a, b, scale = merge_case([(16, 4096, 512)], dtype)
    residuals = [torch.zeros_like(weights[0])] if rounding == "compensated" else None
    with interpreter.traffic() as counted:
        add_low_rank.add_low_rank_(weights, a, b, scale, rounding, 0, residuals)
    minimum = passes * size(*weights) + size(*a, *b, scale)
    assert minimum <= counted.total <= 1.05 * minimum, f"{counted.total / minimum:.4f}"


@COUNTED
@pytest.mark.parametrize("n_pairs", [1, 24, 224])
def test_launches_do_not_grow_with_pairs(n_pairs, monkeypatch):
    monkeypatch.setattr(InterpretedFunction, "run", lambda *args, **kwargs: None)  # launches are counted, not run
    shapes = [(2 + i % 3, 16 + 8 * (i % 2), 8) for i in range(n_pairs)]
    a, b, da, db = pairs(shapes, FLOAT32)
    factors = [(p, g, torch.zeros_like(p), torch.zeros_like(p)) for p, g in zip(a + b, da + db, strict=True)]
    is_a = [True] * n_pairs + [False] * n_pairs
    hyper, max_rank = torch.tensor([[1e-2, 0.9, 0.999, 1e-8, 0.0]], dtype=torch.float64), min(n_pairs + 1, 4)
    with interpreter.traffic() as counted:
        gram.gram(a, b, da, db, ALL)
        adamw.step_(factors, is_a, hyper, torch.zeros(2 * n_pairs), adamw.StepWork(gram=True))
        transform.transform_(a + b, is_a, torch.zeros(2 * n_pairs, max_rank, max_rank))
        spd.spd_inverse(torch.zeros(2 * n_pairs, max_rank, max_rank), 0.5)
        add_low_rank.add_low_rank_([torch.zeros(8, t.shape[1]) for t in a], a, b, torch.zeros(n_pairs, max_rank))
    names = ["gram", "step", "transform", "spd_solve", "merge"]
    assert counted.launches == [f"lora_{name}_kernel" for name in names]
