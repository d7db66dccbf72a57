"""Compares the kernels of several adapters in one batch, and their twin, with float64, element by element, in Triton's
interpreter (natively on a CUDA machine). Batches, ranks, shapes, strides, dtypes and the tiles of two archs are drawn
at random; the roundings are those of tests/experts/test_expert_kernels.py."""

import random
import struct
from unittest import mock

import pytest
import torch
from launching import DEVICE, poisoned_empty, randn

from lora_fast.kernels import batched, tiles
from lora_fast.kernels.inspection import interpreter
from lora_fast.ops.batched import sort_rows
from lora_fast.ops.reference import batched as twin

pytestmark = pytest.mark.gpu

BFLOAT16, FLOAT16, FLOAT32 = torch.bfloat16, torch.float16, torch.float32
TWIN, KERNELS = pytest.param(twin, id="twin"), pytest.param(batched, id="kernels")


def random_case(seed: int) -> dict:
    """Returns a random case. Numbers of rows at the edges of tiles and adapters without rows are frequent. The last of
    ``counts`` are the rows of no adapter."""
    draw = random.Random(seed)
    count = lambda: draw.choice([0, 0, 1, 5, 15, 16, 17, 64, draw.randint(0, 90)])
    n = draw.choice([1, 2, 3, 5, 17])
    dtype, width = draw.choice([FLOAT16, BFLOAT16, FLOAT32]), lambda: draw.choice([1, 7, 16, 33, 64, 130])
    return {
        "seed": seed,
        "counts": [count() for _ in range(n)] + [draw.choice([0, 0, 3, 70])],
        "ranks": [draw.choice([1, 3, 8, 16, 17, 33, 64, 100]) for _ in range(n)],
        "d_in": width(),
        "d_out": width(),
        "dtype": dtype,
        "adapter": draw.choice([dtype, FLOAT32]),
        "aligned": draw.random() < 0.6,
        "padding": draw.choice([0, 8, 3]),
        "few": draw.random() < 0.5,
        "arch": draw.choice([80, 90]),
    }


def plain_case(counts: list[int], ranks: list[int], **changes) -> dict:
    case = {"seed": 0, "counts": counts, "ranks": ranks, "d_in": 40, "d_out": 24, "dtype": FLOAT32, "adapter": FLOAT32}
    return case | {"aligned": True, "padding": 0, "few": True, "arch": 90} | changes


def make(case: dict) -> dict:
    """Returns the operands. Rows of x of no adapter, and what is between rows, are NaN."""
    seed, ranks, (d_in, d_out) = case["seed"], case["ranks"], (case["d_in"], case["d_out"])
    owners = [adapter for adapter, count in enumerate(case["counts"][:-1]) for _ in range(count)]
    owners += [-1] * case["counts"][-1]
    random.Random(seed).shuffle(owners)
    owner = torch.tensor(owners, dtype=torch.int64, device=DEVICE)
    rows, ends = sort_rows(owner, len(ranks), 1)

    def tall(d: int) -> torch.Tensor:
        wide = torch.full((len(owner), d + case["padding"]), torch.nan, dtype=case["dtype"], device=DEVICE)
        wide[:, :d] = randn(len(owner), d, seed=seed, dtype=case["dtype"])
        return wide[:, :d]

    def factor(*shape: int, seed: int) -> torch.Tensor:
        values = randn(shape[0] * shape[1] + 1, seed=seed, dtype=case["adapter"])
        return (values[:-1] if case["aligned"] else values[1:]).view(shape)

    x = tall(d_in)
    x[owner < 0] = torch.nan
    a = [factor(r, d_in, seed=seed + i) for i, r in enumerate(ranks)]
    b = [factor(d_out, r, seed=seed - i) for i, r in enumerate(ranks)]
    scaling = [1.5 * (-1) ** i / (i + 1) for i in range(len(ranks))]
    return {"x": x, "y": tall(d_out), "factors": (a, b, scaling), "owner": owner, "places": (rows, ends)}


def run(ops, case: dict, t: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns S and y, with the tiles of few rows if ``few``, else with those of many."""
    arch, most = None if DEVICE.type == "cuda" else case["arch"], len(t["x"]) if case["few"] else 0
    with mock.patch.multiple(tiles, SHORT=most, FEW=most), tiles.assume(arch=arch), poisoned_empty():
        table = ops.adapter_table(*t["factors"])
        s = ops.project(t["x"], table, *t["places"])
        y = t["y"].clone()
        assert ops.add_product(y, s, table, *t["places"]) is y
        return s, y


def check(ops, case: dict) -> None:
    t = make(case)
    s, y = run(ops, case, t)
    thin, r = torch.promote_types(case["dtype"], case["adapter"]), max(case["ranks"])
    assert s.dtype is thin and s.shape == (len(t["x"]), r) and y.dtype is case["dtype"]
    part = 2.0**-20 if case["adapter"] is case["dtype"] else 2.0**-16
    (rows, ends), begin = t["places"], 0
    for end, a, b, scale in zip(ends.tolist(), *t["factors"], strict=True):
        own, a, b = rows[begin:end].long(), a.double(), b.double()
        got, x = s[begin:end].double(), t["x"][own].double()
        assert not got[:, len(a) :].any()
        near(got[:, : len(a)], x @ a.T, x.abs() @ a.abs().T, thin, part)
        # A bfloat16 result of the kernels is computed from S in bfloat16 (primitives.dot_rounded).
        rounds = case["dtype"] is BFLOAT16 and ops is batched
        used, base = (s[begin:end].to(BFLOAT16 if rounds else None).double()[:, : len(a)]), t["y"][own].double()
        sizes = base.abs() + abs(scale) * used.abs() @ b.abs().T
        near(y[own].double(), base + scale * used @ b.T, sizes, case["dtype"], part)
        begin = end
    rest = rows[begin:].long()
    assert torch.equal(y[rest], t["y"][rest]), "rows of no adapter are not written"


def near(got, exact, sizes, dtype, part) -> None:
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    assert ((got - exact).abs() <= torch.finfo(dtype).eps / 2 * exact.abs() + part * sizes + smallest).all()


@pytest.mark.parametrize("ops", [TWIN, KERNELS])
def test_results_are_those_of_float64(ops):
    for seed in range(12):
        check(ops, random_case(seed))


@pytest.mark.budget
@pytest.mark.parametrize("first", range(100, 300, 20))
def test_results_of_200_cases_are_those_of_float64(first):
    for seed in range(first, first + 20):
        check(batched, random_case(seed))


def test_each_op_is_one_launch_and_repeats_its_bits():
    case = plain_case([3, 0, 40, 17, 4], [8, 16, 3, 40], dtype=BFLOAT16)
    t = make(case)
    if DEVICE.type == "cpu":
        with interpreter.traffic() as counted:
            first = run(batched, case, t)
        assert sorted(counted.launches) == ["lora_batched_project_kernel", "lora_batched_update_kernel"]
    else:
        first = run(batched, case, t)
    own = slice(0, int(t["places"][1][-1]))
    again = run(batched, case, t)
    assert torch.equal(first[0][own], again[0][own]) and torch.equal(first[1], again[1])


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_values_that_are_not_finite_stay_with_their_row(value):
    """An infinite row of an adapter of rank 1 stays infinite beside one of rank 8, and does not become NaN."""
    case = plain_case([20, 18, 0], [8, 1], d_in=8)
    t = make(case)
    clean, own = run(batched, case, t)[1], int(t["places"][0][25])
    t["x"][own, 0] = value
    y = run(batched, case, t)[1]
    others = torch.arange(len(y), device=DEVICE) != own
    assert (y[own].isnan() if value != value else y[own].isinf()).all() and torch.equal(y[others], clean[others])


def test_table_is_the_struct_of_c():
    """{const void *a, *b; int64_t r; float scaling, reserved}."""
    a, b = [randn(3, 8), randn(16, 8)], [randn(5, 3), randn(5, 16)]
    entries = batched.adapter_table(a, b, [-0.5, 2.0]).entries
    assert entries.dtype is torch.int64 and entries.shape == (2, 4) and entries.is_contiguous()
    got = [struct.unpack("<qqqff", entries[i].cpu().numpy().tobytes()) for i in range(2)]
    assert got == [(a[i].data_ptr(), b[i].data_ptr(), (3, 16)[i], (-0.5, 2.0)[i], 0.0) for i in range(2)]
    assert batched.adapter_table(a, b, [-0.5, 2.0]).entries is entries
    assert batched.adapter_table(a, b, [-0.5, 3.0]).entries is not entries


@pytest.mark.parametrize("ops", [TWIN, KERNELS])
@pytest.mark.parametrize("size", [1, 3])
def test_host_and_device_sort_the_rows_alike(ops, size):
    samples = [2, -1, 0, 2, 0, -1, 3]
    on_device = sort_rows(torch.tensor(samples, device=DEVICE), 4, size)
    assert all(map(torch.equal, ops.sorted_rows(samples, 4, size, DEVICE), on_device))
    rows, ends = (places.tolist() for places in on_device)
    assert ends == [2 * size, 2 * size, 4 * size, 5 * size] and sorted(rows) == list(range(7 * size))
    owners = [samples[row // size] for row in rows]
    assert owners == [0] * 2 * size + [2] * 2 * size + [3] * size + [-1] * 2 * size


def test_graph_is_replayed_with_another_composition():
    """Only the values of rows and ends differ between two launches with the same arguments."""
    case = plain_case([5, 16, 30, 0], [8, 3, 16])
    t = make(case)
    table = batched.adapter_table(*t["factors"])
    other = make(plain_case([40, 0, 1, 10], [8, 3, 16]))["owner"]
    for owner in (t["owner"], other):
        for place, value in zip(t["places"], sort_rows(owner, 3, 1), strict=True):
            place.copy_(value)
        t["x"].nan_to_num_()
        s = batched.project(t["x"], table, *t["places"])
        y = batched.add_product(t["y"].clone(), s, table, *t["places"])
        own = twin.adapter_table(*t["factors"])
        wanted = twin.add_product(t["y"].clone(), twin.project(t["x"], own, *t["places"]), own, *t["places"])
        torch.testing.assert_close(y, wanted)
