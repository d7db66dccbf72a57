"""Compares the kernels of experts with float64, element by element, in Triton's interpreter (natively on a CUDA
machine). Routings, shapes, strides, dtypes and the tiles of two archs are drawn at random.

The roundings of a kernel are those of its operands as it takes them, and one of its float32 sum. So an element may err
by half a unit in the last place of its result, and by a part of the sum of its terms' sizes, which are all positive.
Where a float32 factor, S or dS is split into two bfloat16 halves, that part is 2⁻¹⁶, else 2⁻²⁰.
"""

import random
from functools import partial
from unittest import mock

import pytest
import torch
from launching import DEVICE, poisoned_empty, randn, size

from lora_fast.kernels import experts, tiles

pytestmark = pytest.mark.gpu

BFLOAT16, FLOAT16, FLOAT32 = torch.bfloat16, torch.float16, torch.float32
SCALING = 1.5
NAMES = ("S", "dS", "y", "dx", "da", "db")


def random_case(seed: int) -> dict:
    """Returns a random case. Numbers of rows at the edges of tiles, experts without rows, and rows of no expert, which
    are the last of ``counts``, are frequent."""
    draw = random.Random(seed)
    count = lambda: draw.choice([0, 0, 0, 1, 5, 15, 16, 17, 64, draw.randint(0, 90)])
    counts = [count() for _ in range(draw.choice([1, 2, 3, 5, 9, 17]))]
    dtype, width = draw.choice([FLOAT16, BFLOAT16, FLOAT32]), lambda: draw.choice([1, 7, 16, 33, 64, 130])
    return {
        "seed": seed,
        "counts": [*counts, draw.choice([0, 0, 3, 70])],
        "d_in": width(),
        "d_out": width(),
        "r": draw.choice([1, 3, 8, 16, 17, 33, 64, 100, 256]),
        "dtype": dtype,
        "adapter": draw.choice([dtype, FLOAT32]),
        "peft_b": draw.random() < 0.5,
        "padding": draw.choice([0, 8, 3]),
        "few": draw.random() < 0.5,
        "arch": draw.choice([80, 90]),
    }


def make_tensors(case: dict) -> dict:
    """Returns the operands. Rows of no expert, and what is between rows, are NaN."""
    *counts, rest = case["counts"]
    n_experts, d_in, d_out, r, n = len(counts), case["d_in"], case["d_out"], case["r"], sum(counts)
    make = partial(randn, seed=case["seed"])

    def rows(d: int) -> torch.Tensor:
        wide = torch.full((n + rest, d + case["padding"]), torch.nan, dtype=case["dtype"], device=DEVICE)
        wide[:n, :d] = make(n, d, dtype=case["dtype"])
        return wide[:, :d]

    b = make(d_out, r, n_experts, dtype=case["adapter"]).permute(2, 0, 1)
    return {
        "x": rows(d_in),
        "dy": rows(d_out),
        "y": rows(d_out),
        "dx": rows(d_in),
        "lora_A": make(n_experts, r, d_in, dtype=case["adapter"]),
        "lora_B": b if case["peft_b"] else b.contiguous(),
        "offsets": torch.tensor(counts, dtype=torch.int32, device=DEVICE).cumsum(0, dtype=torch.int32),
    }


def run_kernels(case: dict, t: dict) -> dict[str, torch.Tensor]:
    """Returns the results by name, with the tiles of few rows if ``few``, else with those of many."""
    a, b, offsets = t["lora_A"], t["lora_B"], t["offsets"]
    arch, most = None if DEVICE.type == "cuda" else case["arch"], len(t["x"]) if case["few"] else 0
    with mock.patch.multiple(tiles, SHORT=most, FEW=most), tiles.assume(arch=arch), poisoned_empty():
        s, ds = experts.project(t["x"], a, offsets), experts.grad_s(t["dy"], b, SCALING, offsets)
        y = experts.add_product(t["y"].clone(), s, b.mT, SCALING, offsets)
        dx = experts.add_product(t["dx"].clone(), ds, a, 1.0, offsets)
        da, db = experts.grad_factors(t["x"], t["dy"], s, ds, a, b, SCALING, offsets)
    return dict(zip(NAMES, (s, ds, y, dx, da, db), strict=True))


def expert_rows(t: dict) -> list[slice]:
    ends = t["offsets"].tolist()
    return [slice(begin, end) for begin, end in zip([0, *ends], ends, strict=False)]


def exact_results(case: dict, t: dict, got: dict) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Returns each result in float64, from the S and dS of the kernels, and the sum of its terms' sizes."""
    wide = {name: tensor.double() for name, tensor in (t | got).items()}
    a, b = wide["lora_A"], wide["lora_B"]
    # A bfloat16 result is computed from S and dS in bfloat16 (primitives.dot_rounded).
    s, ds = (got[name].to(BFLOAT16 if case["dtype"] is BFLOAT16 else None).double() for name in ("S", "dS"))
    results = {name: (torch.zeros_like(wide[name]), torch.zeros_like(wide[name])) for name in NAMES}

    def put(name: str, place: slice | int, left: torch.Tensor, right: torch.Tensor, base: torch.Tensor | float = 0.0):
        exact, sizes = results[name]
        exact[place] = base + left @ right
        sizes[place] = abs(base) + left.abs() @ right.abs()

    for e, own in enumerate(expert_rows(t)):
        put("S", own, wide["x"][own], a[e].T)
        put("dS", own, SCALING * wide["dy"][own], b[e])
        put("y", own, SCALING * s[own], b[e].T, t["y"][own].double())
        put("dx", own, ds[own], a[e], t["dx"][own].double())
        put("da", e, wide["dS"][own].T, wide["x"][own])
        put("db", e, SCALING * wide["dy"][own].T, wide["S"][own])
    return results


def check_case(case: dict) -> None:
    t = make_tensors(case)
    got = run_kernels(case, t)
    thin = torch.promote_types(case["dtype"], case["adapter"])
    dtypes = thin, thin, case["dtype"], case["dtype"], case["adapter"], case["adapter"]
    part = 2.0**-20 if case["adapter"] is case["dtype"] else 2.0**-16
    for dtype, (name, (exact, sizes)) in zip(dtypes, exact_results(case, t, got).items(), strict=True):
        assert got[name].dtype is dtype and got[name].shape == exact.shape, name
        smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        allowed = torch.finfo(dtype).eps / 2 * exact.abs() + part * sizes + smallest
        wrong = (got[name].double() - exact).abs() > allowed
        # Rows of no expert are NaN in y and dx before, and 0 after.
        assert not wrong.any() and not got[name].isnan().any(), f"{name} of {case}"
    assert got["da"].is_contiguous() and got["db"].is_contiguous()


@pytest.mark.parametrize("first", [0, 8])
def test_results_are_those_of_float64(first):
    for seed in range(first, first + 8):
        check_case(random_case(seed))


@pytest.mark.budget
@pytest.mark.parametrize("first", range(100, 400, 20))
def test_results_of_300_cases_are_those_of_float64(first):
    for seed in range(first, first + 20):
        check_case(random_case(seed))


def plain_case(counts: list[int], **changes) -> dict:
    """Returns a case with these rows of each expert, and at last those of no expert."""
    case = {"seed": 0, "counts": counts, "d_in": 40, "d_out": 24, "r": 8, "dtype": FLOAT32, "adapter": FLOAT32}
    return case | {"peft_b": True, "padding": 0, "few": True, "arch": 90} | changes


def test_rows_of_600_experts_meet_their_own_factor():
    counts = torch.tensor(random.Random(0).choices([0, 0, 0, 1, 2, 17], k=600), device=DEVICE)
    offsets = counts.cumsum(0, dtype=torch.int32)
    x, a = torch.ones(int(offsets[-1]) + 5, 1, device=DEVICE), torch.arange(1.0, 601.0, device=DEVICE).view(600, 1, 1)
    expected = torch.cat([a.flatten().repeat_interleave(counts), torch.zeros(5, device=DEVICE)])
    assert torch.equal(experts.project(x, a, offsets).flatten(), expected)


def test_same_inputs_give_the_same_bits():
    case = plain_case([0, 90, 3, 0, 70, 0], dtype=BFLOAT16)
    t = make_tensors(case)
    first = run_kernels(case, t)
    for _ in range(2):
        again = run_kernels(case, t)
        assert all(torch.equal(first[name], again[name]) for name in NAMES)


def test_nan_stays_with_its_row_and_its_expert():
    case = plain_case([3, 20, 0, 18, 0])
    t = make_tensors(case)
    clean, place = run_kernels(case, t), 3 + 5
    t["x"][place], t["dy"][place] = torch.nan, torch.nan
    for name, result in run_kernels(case, t).items():
        own = 1 if name in ("da", "db") else place
        assert result[own].isnan().any()
        others = torch.arange(len(result), device=DEVICE) != own
        assert torch.equal(result[others], clean[name][others])


def test_gradients_that_are_not_needed_are_none():
    case = plain_case([5, 0, 9, 0])
    t = make_tensors(case)
    every = run_kernels(case, t)
    run = lambda ds, *needs: experts.grad_factors(
        t["x"], t["dy"], every["S"], ds, t["lora_A"], t["lora_B"], SCALING, t["offsets"], *needs
    )
    (a, no_b), (no_a, b) = run(every["dS"], True, False), run(None, False, True)
    assert torch.equal(a, every["da"]) and torch.equal(b, every["db"]) and no_a is None and no_b is None
    assert run(None, False, False) == (None, None)


@pytest.mark.parametrize("counts", [[0, 0, 0], [0, 0, 7]], ids=["no rows", "rows of no expert"])
def test_experts_without_rows_have_zero_gradients(counts):
    case = plain_case(counts)
    results = run_kernels(case, make_tensors(case))
    assert all(len(results[name]) == counts[-1] for name in ("S", "dS", "y", "dx"))
    assert all(not results[name].any() for name in NAMES)


def test_addresses_beyond_int32_are_correct():
    """The first and the last row are 2³¹ elements apart, so that an offset in 32 bits would overflow. Each number of
    the strides fits into 32 bits."""
    if DEVICE.type == "cuda" and torch.cuda.mem_get_info()[0] < 6 << 30:
        pytest.skip("needs 6 GiB of GPU memory")
    stride = (1 << 30) + 64
    far = torch.empty(2 * stride + 64, dtype=FLOAT16, device=DEVICE).as_strided((3, 64), (stride, 1))
    far.copy_(torch.arange(192).view(3, 64))
    before, eye = far.clone(), torch.eye(64, dtype=FLOAT16, device=DEVICE)[None]
    offsets = torch.tensor([3], dtype=torch.int32, device=DEVICE)
    assert torch.equal(experts.project(far, eye, offsets), before)
    da, db = experts.grad_factors(far, far, eye[0, :3], eye[0, :3], eye, eye, 1.0, offsets)
    assert torch.equal(da[0, :3], before) and torch.equal(db[0, :, :3], before.T)
    assert torch.equal(experts.add_product(far, before, eye, 1.0, offsets), 2 * before)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="counted by the interpreter")
def test_launches_and_bytes_do_not_grow_with_experts_without_rows():
    """Each program reads the offsets, and nothing else of an expert that has no rows but its gradients."""
    from lora_fast.kernels.inspection import interpreter

    counted, sizes = {}, {}
    for n_experts in (4, 64):
        case = plain_case([9] * 4 + [0] * (n_experts - 4) + [0])
        t = make_tensors(case)
        with interpreter.traffic() as counted[n_experts]:
            results = run_kernels(case, t)
        sizes[n_experts] = size(results["da"], results["db"])
    few, many = counted[4], counted[64]
    assert few.launches == many.launches and len(many.launches) == 5
    assert many.stored - few.stored == sizes[64] - sizes[4]
    programs = 9 * 4 // 16 + 64 + 1  # of each of the four products, of 16 rows
    assert many.loaded - few.loaded <= 4 * (4 * programs * (64 + 2) + 2 * 64 * 2)
