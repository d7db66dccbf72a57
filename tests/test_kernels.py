"""The layer's kernels against float64, through Triton's interpreter (natively on a CUDA machine): random shapes,
strides, dtypes, adapters, dropout, both GEMM strategies, the tiles of two archs."""

import random
from contextlib import contextmanager

import pytest
import torch
from budget import DRAWS, check, eager_lora_linear, error

from lora_fast import reference
from lora_fast.kernels import launch, layer, tiles

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NAMES = ("y", "dx", "dbias", "da", "db")


def random_case(seed: int) -> dict:
    """A shape with small and odd sizes often, a layout, dtypes, dropout and a kernel configuration."""
    draw = random.Random(seed)
    odd = [1, 2, 7, 8, 16, 17, 33, 64, 65]
    size = lambda limit: draw.choice(odd) if draw.random() < 0.5 else draw.randint(1, limit)
    dtype = draw.choice([torch.float16, torch.float32])
    return {
        "seed": seed,
        "n_tokens": size(150),
        "d_in": size(200),
        "d_out": size(200),
        "r": draw.choice([1, 2, 3, 4, 8, 8, 16, 16, 17, 32, 33, 64, 100, 256]),
        "dtype": dtype,
        "adapter": draw.choice([dtype, torch.float32]),
        "bias": draw.random() < 0.5,
        "dropout_p": draw.choice([0.0, 0.0, 0.1, 0.5]),
        "strategy": draw.choice(["fused", "cublas"]),
        "arch": draw.choice([80, 90]),
        "layout": draw.choice(["contiguous", "padded", "transposed", "sliced"]),
    }


def laid_out(matrix: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values behind other strides; what lies between them is NaN."""
    rows, columns = matrix.shape
    if layout == "transposed":
        return matrix.t().contiguous().t()
    if layout == "padded":
        wide = torch.full((rows, columns + 8), float("nan"), dtype=matrix.dtype, device=matrix.device)
        wide[:, :columns] = matrix
        return wide[:, :columns]
    if layout == "sliced":
        wide = torch.full((2 * rows, 2 * columns), float("nan"), dtype=matrix.dtype, device=matrix.device)
        wide[::2, ::2] = matrix
        return wide[::2, ::2]
    return matrix


def make_tensors(case: dict) -> dict:
    generator = torch.Generator().manual_seed(case["seed"])
    n_tokens, d_in, d_out, r = (case[key] for key in ("n_tokens", "d_in", "d_out", "r"))
    make = lambda *shape, dtype: torch.randn(*shape, generator=generator).to(DEVICE, dtype)
    return {
        "x": laid_out(make(n_tokens, d_in, dtype=case["dtype"]), case["layout"]),
        "weight": laid_out(make(d_out, d_in, dtype=case["dtype"]), case["layout"]),
        "bias": make(d_out, dtype=case["dtype"]) if case["bias"] else None,
        "lora_A": laid_out(make(r, d_in, dtype=case["adapter"]), case["layout"]),
        "lora_B": laid_out(make(d_out, r, dtype=case["adapter"]), case["layout"]),
        "dy": laid_out(make(n_tokens, d_out, dtype=case["dtype"]), case["layout"]),
    }


@contextmanager
def poisoned_empty():
    """torch.empty full of NaN: a kernel that leaves an element unwritten shows."""
    empty = torch.empty
    torch.empty = lambda *args, **kwargs: empty(*args, **kwargs).fill_(float("nan"))
    try:
        yield
    finally:
        torch.empty = empty


def run_kernels(t: dict, case: dict) -> tuple:
    scaling, dropout_p, seed = 1.5, case["dropout_p"], (1 << 40) + case["seed"]
    keep = layer.draw_mask(seed, *t["x"].shape, dropout_p, DEVICE) if dropout_p else None
    scale = scaling * (reference.keep_scale(dropout_p) if dropout_p else 1.0)
    arch = None if DEVICE.type == "cuda" else case["arch"]
    with tiles.assume(arch=arch, strategy=case["strategy"]), poisoned_empty():
        s = layer.project(t["x"], t["lora_A"], keep)
        y = layer.linear(t["x"], t["weight"], t["bias"], s, t["lora_B"], scale)
        ds, db = layer.grad_s_b(t["dy"], s, t["lora_B"], scale)
        da = layer.grad_a(t["x"], ds, t["lora_A"], keep)
        dx = layer.grad_x(t["dy"], t["weight"], ds, t["lora_A"], keep)
    return y, dx, t["dy"].sum(0), da, db


def run_autograd(t: dict, case: dict, dtype: torch.dtype | None = None) -> tuple:
    """PEFT's formula and its gradients, in the case's dtypes or all in ``dtype``."""
    leaves = {}
    for name, tensor in t.items():
        tensor = tensor if tensor is None or dtype is None else tensor.to(dtype)
        leaves[name] = None if tensor is None else tensor.detach().clone().requires_grad_(name not in ("dy", "weight"))
    keep, kept = None, 1.0
    if case["dropout_p"]:
        keep = reference.philox_mask((1 << 40) + case["seed"], *t["x"].shape, case["dropout_p"]).to(DEVICE)
        kept = 1.0 / reference.keep_scale(case["dropout_p"])
    inputs = [leaves[name] for name in ("x", "weight", "bias", "lora_A", "lora_B")]
    y = eager_lora_linear(*inputs, 1.5, keep, kept)
    y.backward(leaves["dy"])
    dbias = leaves["bias"].grad if case["bias"] else leaves["dy"].sum(0)
    return y.detach(), leaves["x"].grad, dbias, leaves["lora_A"].grad, leaves["lora_B"].grad


def eager_errors(t: dict, case: dict) -> list[float]:
    """Of each result, the largest error of eager torch over draws that differ in nothing but their roundings."""
    errors = []
    for draw in range(DRAWS):
        scale = 1 + draw / DRAWS
        scaled = {**t, "x": t["x"] * scale, "dy": t["dy"] * scale}
        runs = run_autograd(scaled, case), run_autograd(scaled, case, torch.float64)
        errors.append([error(eager, exact) for eager, exact in zip(*runs, strict=True)])
    return [max(of_result) for of_result in zip(*errors, strict=True)]


def check_case(case: dict) -> None:
    t = make_tensors(case)
    results = run_kernels(t, case), run_autograd(t, case, torch.float64), eager_errors(t, case)
    for name, got, exact, eager_error in zip(NAMES, *results, strict=True):
        check(f"{name} of {case}", got, exact, eager_error, case["dtype"])
    for name, got in zip(("da", "db"), results[0][3:], strict=True):
        assert got.dtype == case["adapter"], name


@pytest.mark.parametrize("first", range(0, 320, 20))
def test_error_budget(first):
    for seed in range(first, first + 20):
        check_case(random_case(seed))


@pytest.mark.budget
@pytest.mark.parametrize("first", range(1000, 3000, 50))
def test_error_budget_2000(first):
    for seed in range(first, first + 50):
        check_case(random_case(seed))


@pytest.mark.parametrize("strategy", ["fused", "cublas"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
@pytest.mark.parametrize("r", [8, 40])
def test_bfloat16(r, dropout_p, strategy):
    shape = {"n_tokens": 70, "d_in": 72, "d_out": 136, "r": r, "bias": True, "seed": r}
    kinds = {"dtype": torch.bfloat16, "adapter": torch.float32, "layout": "padded", "arch": 90}
    check_case({**shape, **kinds, "dropout_p": dropout_p, "strategy": strategy})


@pytest.mark.parametrize("arch", [80, 90])
def test_several_tiles_and_partial_sums(arch):
    """More tokens and columns than one tile in every kernel, so that swizzle, splits and partial sums all count."""
    shape = {"n_tokens": 700, "d_in": 600, "d_out": 1100, "r": 16, "bias": True, "seed": 1}
    kinds = {"dtype": torch.float16, "adapter": torch.float16, "layout": "contiguous"}
    check_case({**shape, **kinds, "dropout_p": 0.1, "strategy": "fused", "arch": arch})


def test_tma_is_taken_where_rows_are_aligned(monkeypatch):
    taken = []
    uses_tma = tiles.uses_tma
    monkeypatch.setattr(tiles, "uses_tma", lambda *m: taken.append(uses_tma(*m)) or taken[-1])
    case = {**random_case(0), "dtype": torch.float16, "adapter": torch.float16, "strategy": "fused", "arch": 90}
    for d_in, layout in ((64, "contiguous"), (63, "contiguous")):
        check_case({**case, "d_in": d_in, "d_out": 64, "layout": layout})
    assert taken == [True, True, False, False]


def test_same_inputs_same_bits():
    case = {**random_case(3), "n_tokens": 300, "d_in": 150, "d_out": 90, "dropout_p": 0.3}
    t = make_tensors(case)
    first = run_kernels(t, case)
    for _ in range(5):
        assert all(torch.equal(one, again) for one, again in zip(first, run_kernels(t, case), strict=True))


@pytest.mark.parametrize("name", ["x", "weight", "lora_A", "lora_B", "dy"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_come_out(name, value):
    """Where float64 eager gives NaN or Inf, the kernels give no finite number."""
    case = {**random_case(5), "n_tokens": 40, "d_in": 50, "d_out": 30, "r": 4, "dtype": torch.float32}
    case |= {"adapter": torch.float32, "dropout_p": 0.5, "layout": "contiguous", "bias": False}
    t = make_tensors(case)
    t[name][3, 2] = value
    results = run_kernels(t, case), run_autograd(t, case, torch.float64)
    for result, got, exact in zip(NAMES, *results, strict=True):
        assert not (got.isfinite() & ~exact.isfinite()).any(), result


@pytest.mark.parametrize("n_tokens, d_in", [(1, 8), (5, 1), (64, 130), (33, 7)])
@pytest.mark.parametrize("in_memory", [False, True], ids=["number", "tensor"])
def test_mask_is_philox(n_tokens, d_in, in_memory):
    """The kernel's mask, read off S = 1·(keep∘x)·I, is the twin's, bit for bit."""
    seed = (1 << 61) + 12345
    keep = layer.draw_mask(torch.tensor(seed, device=DEVICE) if in_memory else seed, n_tokens, d_in, 0.3, DEVICE)
    got = layer.project(torch.ones(n_tokens, d_in, device=DEVICE), torch.eye(d_in, device=DEVICE), keep)
    assert torch.equal(got.bool().cpu(), reference.philox_mask(seed, n_tokens, d_in, 0.3))


@pytest.mark.parametrize("mask", [reference.philox_mask, lambda *a: reference.draw_mask(*a, torch.device("cpu"))])
@pytest.mark.parametrize("dropout_p", [0.0, 0.05, 0.5, 1.0])
def test_masks_keep_the_right_share(mask, dropout_p):
    kept = mask(7, 500, 400, dropout_p).double()
    assert abs(kept.mean().item() - (1 - dropout_p)) <= 5 * (dropout_p * (1 - dropout_p) / kept.numel()) ** 0.5
    other = mask(8, 500, 400, dropout_p)
    assert (kept.bool() == other).all() == (dropout_p in (0.0, 1.0))


@pytest.mark.parametrize("n_tokens", [0, 1])
def test_few_tokens(n_tokens):
    case = {**random_case(1), "n_tokens": n_tokens, "layout": "contiguous"}
    for got, exact in zip(run_kernels(make_tensors(case), case), run_autograd(make_tensors(case), case), strict=True):
        assert got.shape == exact.shape
        if n_tokens == 0:
            assert torch.equal(got, exact)


def test_only_what_is_needed():
    t = make_tensors({**random_case(2), "layout": "contiguous"})
    s = layer.project(t["x"], t["lora_A"])
    assert layer.grad_s_b(t["dy"], s, t["lora_B"], 1.0, True, False)[1] is None
    assert layer.grad_s_b(t["dy"], s, t["lora_B"], 1.0, False, True)[0] is None


def test_addresses_beyond_int32():
    """Two rows 2³¹ elements apart: an offset in 32 bits would wrap."""
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


def test_rows_copies_only_what_it_must():
    contiguous = torch.randn(4, 6)
    assert launch.rows(contiguous[:, :5]).data_ptr() == contiguous.data_ptr()
    assert launch.rows(contiguous.t()).stride(1) == 1
