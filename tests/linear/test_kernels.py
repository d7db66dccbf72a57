"""Compares the layer's kernels with float64, in Triton's interpreter (natively on a CUDA machine). Shapes, strides,
dtypes, adapters, dropout, ways of forward and backward, and the tiles of two archs are drawn at random."""

import random

import pytest
import torch
from budget import DRAWS, check, eager_lora_linear, error, least_error
from launching import poisoned_empty

from lora_fast.kernels import launch, tiles
from lora_fast.kernels import linear as layer
from lora_fast.ops.reference import linear as reference

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NAMES = ("y", "dx", "dbias", "da", "db")


def random_case(seed: int) -> dict:
    """Returns a random case. Small and odd sizes are frequent. ``rounded`` rounds float32 factors to x's dtype, as
    under autocast."""
    draw = random.Random(seed)
    odd = [1, 2, 7, 8, 16, 17, 33, 64, 65]
    size = lambda limit: draw.choice(odd) if draw.random() < 0.5 else draw.randint(1, limit)
    dtype = draw.choice([torch.float16, torch.bfloat16, torch.float32])
    return {
        "seed": seed,
        "n_tokens": size(150),
        "d_in": size(200),
        "d_out": size(200),
        "r": draw.choice([1, 2, 3, 4, 8, 8, 16, 16, 17, 32, 33, 64, 100, 256]),
        "dtype": dtype,
        "adapter": draw.choice([dtype, torch.float32]),
        "rounded": draw.random() < 0.25,
        "bias": draw.random() < 0.5,
        "dropout_p": draw.choice([0.0, 0.0, 0.1, 0.5]),
        "strategy": draw.choice(["fused", "cublas"]),
        "thin": draw.choice(["pass", "pass", "cublas", "split"]),
        "arch": draw.choice([80, 90]),
        "layout": draw.choice(["contiguous", "padded", "transposed", "sliced"]),
    }


# The value between rows in place of NaN where torch multiplies bfloat16 on a CPU with AMX. oneDNN's product reads each
# row of the left matrix up to a multiple of 32 columns and multiplies the excess by 0, so that a NaN there reaches the
# result (torch 2.13.0 and 2.14.1; ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16 avoids it):
#     wide = torch.full((70, 144), float("nan"), dtype=torch.bfloat16)
#     wide[:, :136] = 1
#     torch.mm(wide[:, :136], torch.ones(136, 64, dtype=torch.bfloat16)).isnan().any()    # True
# If our kernels read this number, their results would be wrong, so the tests detect that as well as with NaN.
FINITE = 12345.0


def laid_out(matrix: torch.Tensor, layout: str, poison: float) -> torch.Tensor:
    """Returns the same values with other strides. The elements between them are set to ``poison``."""
    rows, columns = matrix.shape
    if layout == "transposed":
        return matrix.t().contiguous().t()
    if layout == "padded":
        wide = torch.full((rows, columns + 8), poison, dtype=matrix.dtype, device=matrix.device)
        wide[:, :columns] = matrix
        return wide[:, :columns]
    if layout == "sliced":
        wide = torch.full((2 * rows, 2 * columns), poison, dtype=matrix.dtype, device=matrix.device)
        wide[::2, ::2] = matrix
        return wide[::2, ::2]
    return matrix


def make_tensors(case: dict) -> dict:
    generator = torch.Generator().manual_seed(case["seed"])
    n_tokens, d_in, d_out, r = (case[key] for key in ("n_tokens", "d_in", "d_out", "r"))
    torch_multiplies = case["strategy"] == "cublas" or case["thin"] != "pass"
    poison = FINITE if torch_multiplies and case["dtype"] is torch.bfloat16 else float("nan")
    make = lambda *shape, dtype: torch.randn(*shape, generator=generator).to(DEVICE, dtype)
    matrix = lambda *shape, dtype: laid_out(make(*shape, dtype=dtype), case["layout"], poison)
    return {
        "x": matrix(n_tokens, d_in, dtype=case["dtype"]),
        "weight": matrix(d_out, d_in, dtype=case["dtype"]),
        "bias": make(d_out, dtype=case["dtype"]) if case["bias"] else None,
        "lora_A": matrix(r, d_in, dtype=case["adapter"]),
        "lora_B": matrix(d_out, r, dtype=case["adapter"]),
        "dy": matrix(n_tokens, d_out, dtype=case["dtype"]),
    }


def run_kernels(t: dict, case: dict) -> tuple:
    scaling, dropout_p, seed = 1.5, case["dropout_p"], (1 << 40) + case["seed"]
    keep = layer.draw_mask(t["x"], dropout_p, seed) if dropout_p else None
    scale = scaling * (reference.keep_scale(dropout_p) if dropout_p else 1.0)
    arch = None if DEVICE.type == "cuda" else case["arch"]
    ways = tiles.assume(arch=arch, strategy=case["strategy"], thin=case["thin"])
    factors, rounded = (t["lora_A"], t["lora_B"]), case["rounded"]
    with ways, poisoned_empty():
        y, s = layer.forward(t["x"], t["weight"], t["bias"], *factors, scale, keep, rounded)
        dx, da, db = layer.backward(t["dy"], t["x"], s, t["weight"], *factors, scale, keep, rounded)
    thin = case["dtype"] if rounded else torch.promote_types(case["dtype"], case["adapter"])
    assert s.dtype == thin and s.shape == (case["n_tokens"], case["r"])
    return y, dx, t["dy"].sum(0), da, db


def run_autograd(t: dict, case: dict, dtype: torch.dtype | None = None) -> tuple:
    """Returns the results and gradients of PEFT's formula, in the case's dtypes or all in ``dtype``."""
    leaves = {}
    for name, tensor in t.items():
        tensor = tensor if tensor is None or dtype is None else tensor.to(dtype)
        leaves[name] = None if tensor is None else tensor.detach().clone().requires_grad_(name not in ("dy", "weight"))
    keep, kept = None, 1.0
    if case["dropout_p"]:
        keep = reference.philox_mask((1 << 40) + case["seed"], *t["x"].shape, case["dropout_p"]).to(DEVICE)
        kept = 1.0 / reference.keep_scale(case["dropout_p"])
    inputs = [leaves[name] for name in ("x", "weight", "bias", "lora_A", "lora_B")]
    if case["rounded"] and dtype is None:
        inputs[3:] = [factor.to(case["dtype"]) for factor in inputs[3:]]
    y = eager_lora_linear(*inputs, 1.5, keep, kept)
    y.backward(leaves["dy"])
    dbias = leaves["bias"].grad if case["bias"] else leaves["dy"].sum(0)
    return y.detach(), leaves["x"].grad, dbias, leaves["lora_A"].grad, leaves["lora_B"].grad


def eager_errors(t: dict, case: dict) -> list[float]:
    """Returns the largest error of PEFT's formula for each result, over draws that differ only in their roundings."""
    errors = []
    for draw in range(DRAWS):
        scale = 1 + draw / DRAWS
        scaled = {**t, "x": t["x"] * scale, "dy": t["dy"] * scale}
        runs = run_autograd(scaled, case), run_autograd(scaled, case, torch.float64)
        errors.append([error(eager, exact) for eager, exact in zip(*runs, strict=True)])
    return [max(draws) for draws in zip(*errors, strict=True)]


def torch_multiplies_a_padded_column() -> bool:
    """Returns whether torch's product with a padded column is right. That of torch 2.10 is not in bfloat16 on a CPU."""
    dy, column = torch.ones(48, 97).bfloat16(), torch.ones(97, 5).bfloat16()[:, :1]
    column[1:] = 0
    return bool((dy @ column == 1).all())


def check_case(case: dict) -> None:
    is_padded_column = case["strategy"] == "cublas" and case["layout"] == "padded" and case["d_in"] == 1
    if is_padded_column and not torch_multiplies_a_padded_column():
        return
    t = make_tensors(case)
    results = run_kernels(t, case), run_autograd(t, case, torch.float64), eager_errors(t, case)
    exactly = case["adapter"] is not case["dtype"] and not case["rounded"]
    # Float32 factors are split into halves, which PEFT's formula does not do. If a result depends on only a few such
    # roundings and on sums that may cancel, its error is a matter of luck, and more draws do not average it out.
    few_roundings = exactly and case["n_tokens"] * min(case["r"], case["d_in"], case["d_out"]) <= 128
    luck = 2 if few_roundings else 1
    for name, got, exact, eager_error in zip(NAMES, *results, strict=True):
        is_factor = name in ("da", "db")
        computed_in = case["adapter"] if is_factor and exactly else case["dtype"]
        least = least_error(case["dtype"], case["adapter"]) if is_factor and exactly else 0.0
        check(f"{name} of {case}", got, exact, luck * eager_error, computed_in, luck * least)
        assert got.dtype == (case["adapter"] if is_factor else case["dtype"]), name


@pytest.mark.parametrize("first", range(0, 200, 20))
def test_error_budget(first):
    for seed in range(first, first + 20):
        check_case(random_case(seed))


@pytest.mark.budget
@pytest.mark.parametrize("first", [*range(200, 320, 40), *range(1000, 3000, 40)])
def test_error_budget_of_2120_cases(first):
    for seed in range(first, first + 40):
        check_case(random_case(seed))


@pytest.mark.parametrize("thin", ["pass", "cublas", "split"])
@pytest.mark.parametrize("strategy", ["fused", "cublas"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
@pytest.mark.parametrize("r", [8, 40])
def test_float32_adapters_beside_bfloat16_are_within_the_budget(r, dropout_p, strategy, thin):
    """This is PEFT's default for a model in bfloat16."""
    shape = {"n_tokens": 33, "d_in": 200, "d_out": 136, "r": r, "bias": True, "seed": r}
    kinds = {"dtype": torch.bfloat16, "adapter": torch.float32, "rounded": False, "layout": "padded", "arch": 90}
    check_case({**shape, **kinds, "dropout_p": dropout_p, "strategy": strategy, "thin": thin})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [1e-8, 1e-4, 1e3], ids="factors of {:g}".format)
@pytest.mark.parametrize("thin", ["pass", "cublas"])
def test_float32_factors_of_any_size_keep_their_precision(dtype, size, thin):
    """Float16 halves would underflow below 1e-7, and dS in float16 would overflow above 65,504."""
    case = {**random_case(4), "n_tokens": 90, "d_in": 40, "d_out": 72, "r": 16, "dtype": dtype, "layout": "padded"}
    case |= {"adapter": torch.float32, "rounded": False, "dropout_p": 0.0, "strategy": "fused", "thin": thin}
    t = make_tensors(case)
    factors, dy = (t["lora_A"] * size, t["lora_B"] * size), t["dy"] * 1000
    with tiles.assume(strategy="fused", thin=thin):
        _, s = layer.forward(t["x"], t["weight"], None, *factors, 2.0)
        _, da, db = layer.backward(dy, t["x"], s, t["weight"], *factors, 2.0)
    x, dy, a, b = (tensor.double() for tensor in (t["x"], dy, *factors))
    for got, exact in ((s, x @ a.T), (da, 2 * (dy @ b).T @ x), (db, 2 * dy.T @ (x @ a.T))):
        assert error(got, exact) <= 1e-5


def test_large_ds_and_small_a_give_finite_dx_in_float16():
    """dS overflows float16, but its product with a small a does not."""
    dy, weight = torch.full((32, 16), 1000.0, dtype=torch.float16), torch.zeros(16, 24, dtype=torch.float16)
    a, b, s = torch.full((4, 24), 1e-6), torch.full((16, 4), 100.0), torch.zeros(32, 4)
    tensors = [tensor.to(DEVICE) for tensor in (dy, torch.zeros(32, 24, dtype=torch.float16), s, weight, a, b)]
    exact = 4 * 16 * 1000.0 * 100.0 * 1e-6
    for strategy in ("fused", "cublas"):
        with tiles.assume(strategy=strategy):
            dx, _, _ = layer.backward(*tensors, 1.0)
        assert (dx.double() / exact - 1).abs().max() <= 1e-3


def test_eager_formula_equals_peft_bit_for_bit():
    """The error budget compares with this formula, so it must equal PEFT's own layer."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, target_modules=["0"])
    for dtype, adapter in ((torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.bfloat16,) * 2):
        linear = torch.nn.Linear(40, 24, dtype=dtype)
        theirs = peft.get_peft_model(torch.nn.Sequential(linear), config).base_model.model[0]
        factors = [part["default"].weight for part in (theirs.lora_A, theirs.lora_B)]
        for factor in factors:
            factor.data = factor.data.to(adapter)
        x, dy = torch.randn(9, 40, dtype=dtype, requires_grad=True), torch.randn(9, 24, dtype=dtype)
        ours = eager_lora_linear(x, linear.weight.detach(), linear.bias.detach(), *factors, 2.0)
        for y in (theirs(x), ours):
            assert y.dtype == dtype and torch.equal(y, ours)
        both = [torch.autograd.grad(y, (x, *factors), dy) for y in (theirs(x), ours)]
        assert all(torch.equal(first, second) for first, second in zip(*both, strict=True))


@pytest.mark.parametrize("arch", [80, 90])
def test_several_tiles_and_partial_sums_are_within_the_budget(arch):
    """There are more tokens and columns than one tile in every kernel, so that swizzle, splits and partial sums are
    used."""
    shape = {"n_tokens": 700, "d_in": 600, "d_out": 1100, "r": 16, "bias": True, "seed": 1}
    kinds = {"dtype": torch.float16, "adapter": torch.float16, "rounded": False, "layout": "contiguous"}
    check_case({**shape, **kinds, "dropout_p": 0.1, "strategy": "fused", "thin": "pass", "arch": arch})


def test_tma_is_used_exactly_for_aligned_rows(monkeypatch):
    taken = []
    uses_tma = tiles.uses_tma
    monkeypatch.setattr(tiles, "uses_tma", lambda *m: taken.append(uses_tma(*m)) or taken[-1])
    case = {**random_case(0), "dtype": torch.float16, "adapter": torch.float16, "strategy": "fused", "arch": 90}
    for d_in, d_out in ((64, 64), (63, 64), (64, 63), (1, 64)):
        check_case({**case, "d_in": d_in, "d_out": d_out, "layout": "contiguous"})
    assert taken == [True, True, *[False] * 6]


@pytest.mark.parametrize("strategy", ["fused", "cublas"])
@pytest.mark.parametrize("arch", [80, 90])
def test_gemm_does_not_round_a_float32_factor(strategy, arch):
    """The bfloat16 result of one token cannot show this. The factor is therefore estimated from 2,000 tokens, where the
    independent roundings of S and y cause an error of 1.6e-4 and a rounded factor one of 1.3e-3."""
    thin = torch.randn(2000, 1, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    factor = torch.randn(1, 64, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    left, weight = torch.zeros(2000, 64, dtype=torch.bfloat16, device=DEVICE), torch.zeros(64, 64, device=DEVICE)
    with tiles.assume(arch=arch, strategy=strategy):
        forward = layer.linear(left, weight.bfloat16(), None, thin, factor.t().contiguous(), 1.0)
        backward = layer.grad_x(left, weight.bfloat16(), thin, factor)
    for result in (forward, backward):
        estimate = (thin.double().t() @ result.double()) / thin.double().square().sum()
        assert error(estimate, factor.double()) <= 3e-4


def by_the_global_setting(precision: str) -> None:
    torch.backends.fp32_precision = precision


def by_the_products_setting(precision: str) -> None:
    torch.backends.cuda.matmul.fp32_precision = precision


def by_the_older_setting(precision: str) -> None:
    torch.set_float32_matmul_precision({"tf32": "high", "ieee": "highest"}[precision])


@pytest.mark.parametrize("choose", [by_the_global_setting, by_the_products_setting, by_the_older_setting])
def test_precision_follows_each_of_torchs_tf32_switches(choose):
    """After the first two switches torch raises if ``allow_tf32`` is read."""
    before = torch.backends.fp32_precision, torch.backends.cuda.matmul.fp32_precision
    try:
        for precision in ("tf32", "ieee"):
            choose(precision)
            assert launch.precision(torch.ones(1)) == precision
            assert launch.precision(torch.ones(1, dtype=torch.bfloat16)) == "ieee"
    finally:
        torch.backends.fp32_precision, torch.backends.cuda.matmul.fp32_precision = before


def test_same_inputs_give_the_same_bits():
    case = {**random_case(3), "n_tokens": 300, "d_in": 150, "d_out": 90, "dropout_p": 0.3}
    t = make_tensors(case)
    first = run_kernels(t, case)
    for _ in range(5):
        assert all(torch.equal(result, again) for result, again in zip(first, run_kernels(t, case), strict=True))


@pytest.mark.parametrize("name", ["x", "weight", "lora_A", "lora_B", "dy"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_never_become_finite(name, value):
    """If the formula in float64 gives NaN or Inf, the kernels give no finite number."""
    case = {**random_case(5), "n_tokens": 40, "d_in": 50, "d_out": 30, "r": 4, "dtype": torch.float32}
    case |= {"adapter": torch.float32, "dropout_p": 0.5, "layout": "contiguous", "bias": False}
    t = make_tensors(case)
    t[name][3, 2] = value
    results = run_kernels(t, case), run_autograd(t, case, torch.float64)
    for result, got, exact in zip(NAMES, *results, strict=True):
        assert not (got.isfinite() & ~exact.isfinite()).any(), result


@pytest.mark.parametrize("n_tokens, d_in", [(1, 8), (5, 1), (64, 130), (33, 7)])
@pytest.mark.parametrize("in_memory", [False, True], ids=["number", "tensor"])
@pytest.mark.parametrize("seed", [7, (1 << 61) + 12345])
def test_mask_equals_the_twins_philox_mask(n_tokens, d_in, in_memory, seed):
    """With x = 1 and a = I, S is the kernel's mask."""
    x, seed_tensor = torch.ones(n_tokens, d_in, device=DEVICE), torch.tensor(seed, device=DEVICE)
    keep = layer.draw_mask(x, 0.3, seed_tensor if in_memory else seed)
    got = layer.project(x, torch.eye(d_in, device=DEVICE), keep)
    assert torch.equal(got.bool().cpu(), reference.philox_mask(seed, n_tokens, d_in, 0.3))


def drawn_mask(seed: int, n_tokens: int, d_in: int, dropout_p: float) -> torch.Tensor:
    return reference.draw_mask(torch.empty(n_tokens, d_in), dropout_p, seed)


@pytest.mark.parametrize("mask", [reference.philox_mask, drawn_mask])
@pytest.mark.parametrize("dropout_p", [0.0, 0.05, 0.5, 1.0])
def test_masks_keep_the_right_share(mask, dropout_p):
    kept = mask(7, 500, 400, dropout_p).double()
    assert abs(kept.mean().item() - (1 - dropout_p)) <= 5 * (dropout_p * (1 - dropout_p) / kept.numel()) ** 0.5
    other = mask(8, 500, 400, dropout_p)
    assert (kept.bool() == other).all() == (dropout_p in (0.0, 1.0))


@pytest.mark.parametrize("n_tokens", [0, 1])
def test_zero_or_one_token_gives_eagers_shapes(n_tokens):
    case = {**random_case(1), "n_tokens": n_tokens, "layout": "contiguous"}
    for got, exact in zip(run_kernels(make_tensors(case), case), run_autograd(make_tensors(case), case), strict=True):
        assert got.shape == exact.shape
        if n_tokens == 0:
            assert torch.equal(got, exact)


def test_gradients_that_are_not_needed_are_none():
    t = make_tensors({**random_case(2), "layout": "contiguous"})
    s = layer.project(t["x"], t["lora_A"])
    assert layer.grad_s_b(t["dy"], s, t["lora_B"], 1.0, True, False)[1] is None
    assert layer.grad_s_b(t["dy"], s, t["lora_B"], 1.0, False, True)[0] is None


def test_addresses_beyond_int32_are_correct():
    """The two rows are 2³¹ elements apart, so that an offset in 32 bits would overflow."""
    if DEVICE.type == "cuda" and torch.cuda.mem_get_info()[0] < 6 << 30:
        pytest.skip("needs 6 GiB of GPU memory")
    stride = (1 << 31) + 64
    far = torch.empty(stride + 64, dtype=torch.float16, device=DEVICE).as_strided((2, 64), (stride, 1))
    far.copy_(torch.arange(128).view(2, 64))
    eye = torch.eye(64, dtype=torch.float16, device=DEVICE)
    assert torch.equal(layer.project(far, eye), far)
    s = torch.zeros(2, 1, dtype=torch.float16, device=DEVICE)
    factor = torch.zeros(64, 1, dtype=torch.float16, device=DEVICE)
    with tiles.assume(strategy="fused"):
        assert torch.equal(layer.linear(far, eye, None, s, factor, 1.0), far)
    assert torch.equal(layer.grad_a(far, s + 1, factor.t()), far.sum(0, keepdim=True))
    assert torch.equal(layer.grad_s_b(far, s + 1, factor + 1, 1.0)[1], far.sum(0).unsqueeze(1))


def test_contiguous_rows_copies_only_if_rows_are_strided():
    contiguous = torch.randn(4, 6)
    assert launch.contiguous_rows(contiguous[:, :5]).data_ptr() == contiguous.data_ptr()
    assert launch.contiguous_rows(contiguous.t()).stride(1) == 1
