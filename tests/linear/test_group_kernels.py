"""Compares the kernels of groups, layers that read the same x, with float64 and with the kernels of single layers, in
Triton's interpreter (natively on a CUDA machine). Members, shapes, dtypes, masks, the gradients that are needed and the
ways are drawn at random."""

import itertools
import random

import pytest
import torch
from budget import DRAWS, check, eager_lora_linear, error, least_error
from launching import DEVICE, poisoned_empty, randn

from lora_fast.kernels import linear as layer
from lora_fast.kernels import tiles
from lora_fast.kernels.linear import group, group_grads
from lora_fast.kernels.linear.grads import GradSB
from lora_fast.ops.reference import linear as reference

pytestmark = pytest.mark.gpu

BFLOAT16, FLOAT16, FLOAT32 = torch.bfloat16, torch.float16, torch.float32
SEED = 1 << 40


def random_case(seed: int) -> dict:
    """Returns a random case of one to four members. Small and odd sizes are frequent."""
    draw = random.Random(seed)
    size = lambda limit: draw.choice([1, 7, 8, 16, 33]) if draw.random() < 0.4 else draw.randint(1, limit)
    dtype, count = draw.choice([FLOAT16, BFLOAT16, FLOAT32]), draw.choice([1, 2, 3, 3, 4])
    same_rank = draw.choice([None, 4, 16, 33])
    members = [
        {
            "d_out": size(80),
            "r": same_rank or draw.choice([1, 3, 8, 16, 17, 40, 200]),
            "adapter": draw.choice([dtype, dtype, FLOAT32]) if draw.random() < 0.3 else FLOAT32,
            "bias": draw.random() < 0.5,
            "dropout_p": draw.choice([0.0, 0.0, 0.0, 0.3]),
            "transposed": draw.random() < 0.2,  # as Conv1D stores a weight
            "used": draw.random() < 0.8,
            "needs": (draw.random() < 0.8, draw.random() < 0.8),
        }
        for _ in range(count)
    ]
    return {
        "seed": seed,
        "n_tokens": size(90),
        "d_in": size(100),
        "dtype": dtype,
        "members": members,
        "need_x": draw.random() < 0.8,
        "rounded": draw.random() < 0.25,
        "lead": draw.random() < 0.3,
        "strategy": draw.choice(["fused", "cublas"]),
        "thin": draw.choice(["pass", "pass", "short", "split", "cublas"]),
        "arch": draw.choice([80, 90]),
    }


def tensors_of(case: dict) -> tuple[torch.Tensor, list[dict]]:
    """Returns x and the tensors of each member."""
    seeds, dtype, n_tokens, d_in = (
        iter(range(case["seed"] * 100, 1 << 30)),
        case["dtype"],
        case["n_tokens"],
        case["d_in"],
    )
    make = lambda *shape, dtype: randn(*shape, seed=next(seeds), dtype=dtype)
    members = []
    for each in case["members"]:
        d_out, r = each["d_out"], each["r"]
        weight = make(d_in, d_out, dtype=dtype).t() if each["transposed"] else make(d_out, d_in, dtype=dtype)
        factors = {"lora_A": make(r, d_in, dtype=each["adapter"]), "lora_B": make(d_out, r, dtype=each["adapter"])}
        bias = make(d_out, dtype=dtype) if each["bias"] else None
        members.append({"weight": weight, "bias": bias, **factors, "dy": make(n_tokens, d_out, dtype=dtype)})
    return make(n_tokens, d_in, dtype=dtype), members


def as_members(x: torch.Tensor, case: dict, members: list[dict]) -> list[tuple]:
    """Returns the members as the kernels take them, with a mask of its own each."""
    result = []
    for i, (each, t) in enumerate(zip(case["members"], members, strict=True)):
        p = each["dropout_p"]
        keep = layer.draw_mask(x, p, SEED + i) if p else None
        scale = 1.5 * (reference.keep_scale(p) if p else 1.0)
        result.append((t["weight"], t["bias"], t["lora_A"], t["lora_B"], scale, keep))
    return result


def ways_of(case: dict):
    arch = None if DEVICE.type == "cuda" else case["arch"]
    return tiles.assume(arch=arch, strategy=case["strategy"], thin=case["thin"])


def run_kernels(case: dict, x: torch.Tensor, members: list[dict]) -> dict[str, torch.Tensor | None]:
    """Returns the results by name. What is not needed is not passed, or is NaN."""
    arguments, used = as_members(x, case, members), [each["used"] for each in case["members"]]
    needs = case["need_x"], *zip(*(each["needs"] for each in case["members"]), strict=True)
    shaped = (lambda t: t.unsqueeze(0)) if case["lead"] else lambda t: t
    with ways_of(case), poisoned_empty():
        ys, ss = layer.group_forward(shaped(x), arguments, case["rounded"])
        dys = [shaped(t["dy"]) if on else None for t, on in zip(members, used, strict=True)]
        read = [s if need else None for s, need in zip(ss, needs[2], strict=True)]
        read_x = (
            x if any(on and need for on, need in zip(used, needs[1], strict=True)) else torch.full_like(x, torch.nan)
        )
        dx, das, dbs = layer.group_backward(dys, shaped(read_x), read, arguments, case["rounded"], needs)
    results: dict[str, torch.Tensor | None] = {"dx": dx if dx is None else dx.reshape(x.shape)}
    assert dx is None or dx.shape == shaped(x).shape
    for i in range(len(members)):
        results |= {f"y{i}": ys[i].reshape(len(x), -1), f"da{i}": das[i], f"db{i}": dbs[i]}
    return results


def run_autograd(case: dict, x: torch.Tensor, members: list[dict], dtype: torch.dtype | None = None) -> dict:
    """Returns the results and gradients of PEFT's formula, in the case's dtypes or all in ``dtype``. ``torch.autograd``
    adds the dx of the members."""
    cast = lambda t: t if t is None else t.detach().clone().to(dtype or t.dtype)
    x, results, losses = cast(x).requires_grad_(), {}, []
    leaves = []
    for i, (each, t) in enumerate(zip(case["members"], members, strict=True)):
        a, b = (cast(t[name]).requires_grad_() for name in ("lora_A", "lora_B"))
        p, inputs = each["dropout_p"], (a, b)
        if case["rounded"] and dtype is None:
            inputs = [factor.to(case["dtype"]) for factor in inputs]
        keep = reference.philox_mask(SEED + i, *x.shape, p).to(DEVICE) if p else None
        kept = 1.0 / reference.keep_scale(p) if p else 1.0
        y = eager_lora_linear(x, cast(t["weight"]), cast(t["bias"]), *inputs, 1.5, keep, kept)
        results[f"y{i}"] = y.detach()
        leaves.append((a, b))
        if each["used"]:
            losses.append((y, cast(t["dy"])))
    if losses:
        torch.autograd.backward(*zip(*losses, strict=True))
    results["dx"] = x.grad if case["need_x"] and losses else None
    for i, ((a, b), each) in enumerate(zip(leaves, case["members"], strict=True)):
        for name, leaf, need in (("da", a, each["needs"][0]), ("db", b, each["needs"][1])):
            results[f"{name}{i}"] = leaf.grad if need and each["used"] else None
    return results


def eager_errors(case: dict, x: torch.Tensor, members: list[dict]) -> dict[str, float]:
    """Returns the largest error of PEFT's formula for each result, over draws that differ only in their roundings."""
    errors: dict[str, float] = {}
    for draw in range(DRAWS):
        scale = 1 + draw / DRAWS
        scaled = x * scale, [{**t, "dy": t["dy"] * scale} for t in members]
        eager, exact = run_autograd(case, *scaled), run_autograd(case, *scaled, torch.float64)
        for name, result in eager.items():
            if result is not None:
                errors[name] = max(errors.get(name, 0.0), error(result, exact[name]))
    return errors


def check_case(case: dict) -> None:
    """Checks every result against the error budget, and dx against ``group_grad_x``, da and db against single layers,
    bit for bit."""
    x, members = tensors_of(case)
    got, exact, eager = run_kernels(case, x, members), run_autograd(case, x, members, torch.float64), None
    eager = eager_errors(case, x, members)
    assert got.keys() == exact.keys()
    for name, result in got.items():
        assert (result is None) == (exact[name] is None), f"{name} of {case}"
        if result is None:
            continue
        each = case["members"][int(name[-1])] if name != "dx" else {"adapter": case["dtype"], "r": 16, "d_out": 16}
        is_factor = name[:2] in ("da", "db")
        exactly = is_factor and each["adapter"] is not case["dtype"] and not case["rounded"]
        few_roundings = exactly and case["n_tokens"] * min(each["r"], case["d_in"], each["d_out"]) <= 128
        luck = 2 if few_roundings else 1  # as in test_kernels.py
        least = least_error(case["dtype"], each["adapter"]) if exactly else 0.0
        computed_in = each["adapter"] if exactly else case["dtype"]
        check(f"{name} of {case}", result, exact[name], luck * eager[name], computed_in, luck * least)
        assert result.dtype == (each["adapter"] if is_factor else case["dtype"]), name


@pytest.mark.parametrize("first", range(0, 32, 8))
def test_error_budget(first):
    for seed in range(first, first + 8):
        check_case(random_case(seed))


@pytest.mark.budget
@pytest.mark.parametrize("first", [*range(32, 48, 8), *range(1000, 1600, 8)])
def test_error_budget_of_616_cases(first):
    for seed in range(first, first + 8):
        check_case(random_case(seed))


def plain_case(**changes) -> dict:
    """Returns a case of three members like q, k and v, all of whose gradients are needed."""
    member = {"r": 5, "adapter": FLOAT32, "bias": False, "dropout_p": 0.0, "transposed": False, "used": True}
    members = [{**member, "d_out": d_out, "needs": (True, True)} for d_out in (48, 24, 16)]
    common = {"seed": 5, "n_tokens": 70, "d_in": 40, "dtype": BFLOAT16, "need_x": True, "rounded": False, "lead": False}
    return {**common, "members": members, "strategy": "fused", "thin": "pass", "arch": 90, **changes}


WAYS = [("fused", 80, 0.0), ("fused", 90, 0.0), ("fused", 90, 0.3), ("cublas", 90, 0.0), ("cublas", 90, 0.3)]


@pytest.mark.parametrize("strategy, arch, dropout_p", WAYS)
def test_gradients_equal_those_of_their_parts(strategy, arch, dropout_p):
    """dx is that of ``group_grad_x`` of any subset, dS of ``thin_gradients``, da and db those of single layers, bit for
    bit. One member alone has the dx of a single layer."""
    case = plain_case(strategy=strategy, arch=arch)
    for each in case["members"]:
        each["dropout_p"] = dropout_p
    x, tensors = tensors_of(case)
    members, dys = as_members(x, case, tensors), [t["dy"] for t in tensors]
    with ways_of(case):
        _, ss = layer.group_forward(x, members)
        for used in ((0, 1, 2), (0, 2), (1,)):
            some = [dy if i in used else None for i, dy in enumerate(dys)]
            dx, das, dbs = layer.group_backward(some, x, ss, members, False, (True, [True] * 3, [True] * 3))
            parts = []
            for i in used:
                weight, _, a, b, scaling, keep = members[i]
                alone = layer.backward(dys[i], x, ss[i], weight, a, b, scaling, keep)
                ds, *thin = layer.thin_gradients(dys[i], x, ss[i], a, b, scaling, keep, False, (True, True, True))
                for gradients in (alone[1:], thin):
                    assert torch.equal(das[i], gradients[0]) and torch.equal(dbs[i], gradients[1])
                parts.append((dys[i], weight, ds, a, keep))
            assert torch.equal(dx, layer.group_grad_x(x, parts))
            if len(used) == 1:
                assert torch.equal(dx, alone[0])
            assert all((das[i] is None and dbs[i] is None) for i in range(3) if i not in used)


@pytest.mark.parametrize(
    "strategy, thin, arch",
    [("fused", "pass", 90), ("fused", "pass", 80), ("cublas", "split", 90), ("cublas", "short", 90)],
)
def test_results_are_those_of_single_layers(strategy, thin, arch):
    """S is summed in the same order where the tile of all ranks has the steps of a member's own, here of one class. The
    members of the fused GEMM have one to six tiles each."""
    case = plain_case(strategy=strategy, thin=thin, arch=arch)
    case["n_tokens"], d_outs = (200, (300, 16, 136)) if arch == 80 else (70, (48, 24, 16))
    for each, d_out, bias in zip(case["members"], d_outs, (True, False, True), strict=True):
        each.update(d_out=d_out, bias=bias)
    x, tensors = tensors_of(case)
    members = as_members(x, case, tensors)
    with ways_of(case):
        ys, ss = layer.group_forward(x, members)
        for y, s, member in zip(ys, ss, members, strict=True):
            expected = layer.forward(x, *member)
            assert torch.equal(y, expected[0]) and torch.equal(s, expected[1])


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view({2: torch.int16, 4: torch.int32}[tensor.element_size()])  # 0 and -0 differ


def test_passes_over_every_dy_have_the_bits_of_single_layers(monkeypatch):
    """Covers ranks, widths, dtypes, strides and needs that differ between members, one and several partial sums of each
    result, and results that are -0. Members share a pass, and dS and db of theirs one sum."""
    monkeypatch.setattr(tiles, "PROGRAMS", 6)  # widths then change the token splits, and few tokens have several
    monkeypatch.setattr(tiles, "SPLIT_STEPS", 1)
    sharing = {True: 0, False: 0}  # whether there are partial sums → members that share a pass
    for seed in range(24):
        draw = random.Random(seed)
        dtype, n_tokens = draw.choice([FLOAT16, BFLOAT16, FLOAT32]), draw.choice([5, 30, 130])
        r, adapter = draw.choice([3, 16, 40]), draw.choice([dtype, FLOAT32])
        usual = {
            "d_out": 48,
            "r": r,
            "adapter": adapter,
            "wide": draw.random() < 0.4,
            "padding": 0,
            "needs": (True, True),
        }
        changes = {"d_out": [16, 304, 528], "r": [8], "adapter": [dtype, FLOAT32], "wide": [True], "padding": [3]}
        changes["needs"] = [(True, False), (False, True)]
        dys, ss, factors, needs = [], [], [], {}
        for i in range(draw.choice([2, 3, 4])):
            name = draw.choice(["d_out", "d_out", "d_out", *changes])
            d_out, r, adapter, wide, padding, needs[i] = (usual | {name: draw.choice(changes[name])}).values()
            dys.append(randn(n_tokens, d_out + padding, seed=seed + i, dtype=dtype)[:, :d_out])
            dys[i][::3] = 0
            ss.append(randn(n_tokens, r, seed=seed, dtype=FLOAT32 if wide else torch.promote_types(dtype, adapter)))
            factors.append(randn(d_out, r, seed=seed, dtype=adapter))
        scalings, rounded = [-1.5, 0.3, 2.0, 1.0], draw.random() < 0.3
        with tiles.assume(arch=draw.choice([80, 90])), poisoned_empty():
            passes = group_grads.s_b_passes(range(len(dys)), dys, ss, factors, needs)
            assert sorted(itertools.chain(*passes)) == list(range(len(dys)))
            for where in passes:
                if len(where) == 1:
                    continue
                columns = ([column[i] for i in where] for column in (dys, ss, factors))
                together = group_grads.GroupGradSB(*columns, needs[where[0]], rounded, where)
                sharing[together.parts.add is not None] += len(where)
                for i, *results in zip(where, *together(dys, ss, factors, scalings), strict=True):
                    alone = GradSB(dys[i], ss[i], factors[i], needs[i], rounded)
                    expected = alone(dys[i], ss[i], factors[i], scalings[i])
                    for result, single, need in zip(results, expected, needs[i], strict=True):
                        assert (result is not None) == need
                        assert not need or torch.equal(bits(result), bits(single)), (seed, i)
    assert all(sharing.values()), sharing


def test_same_inputs_give_the_same_bits():
    case = plain_case(n_tokens=200, strategy="fused")
    tensors = tensors_of(case)
    first = run_kernels(case, *tensors)
    for _ in range(3):
        again = run_kernels(case, *tensors)
        assert all(torch.equal(result, again[name]) for name, result in first.items())


@pytest.mark.parametrize("arch", [pytest.param(80, marks=pytest.mark.budget), 90])
def test_several_tiles_and_partial_sums_are_within_the_budget(arch):
    members = [
        {**each, "d_out": d_out, "r": 16} for each, d_out in zip(plain_case()["members"], (300, 136, 1), strict=True)
    ]
    check_case(plain_case(n_tokens=600, d_in=300, members=members, dtype=FLOAT16, arch=arch))


@pytest.mark.parametrize("n_tokens, d_in, d_outs", [(0, 8, (3, 4)), (5, 8, (0, 4, 0)), (5, 8, (0, 0)), (5, 0, (3, 4))])
def test_empty_operands_give_zeros_like_single_layers(n_tokens, d_in, d_outs):
    x = randn(2, n_tokens, d_in)
    members = [(randn(d, d_in), randn(d), randn(2, d_in), randn(d, 2), 1.0, None) for d in d_outs]
    dys, count = [randn(2, n_tokens, d) for d in d_outs], len(d_outs)
    ys, ss = layer.group_forward(x, members)
    dx, das, dbs = layer.group_backward(dys, x, ss, members, False, (True, [True] * count, [True] * count))
    total = torch.zeros_like(x)
    for i, member in enumerate(members):
        y, s = layer.forward(x, *member)
        assert torch.equal(ys[i], y) and torch.equal(ss[i], s)
        own, da, db = layer.backward(dys[i], x, s, member[0], *member[2:])
        total += own
        assert torch.equal(das[i], da) and torch.equal(dbs[i], db)
        thin = layer.thin_gradients(dys[i], x, s, *member[2:], False, (True, True, True))
        assert thin[0].shape == s.shape and torch.equal(thin[1], da) and torch.equal(thin[2], db)
    assert torch.equal(dx, total)


def test_members_share_a_pass_while_their_ranks_fit():
    ranks = [100, 100, 100, 16]
    assert group.passes(range(4), lambda i: "same", lambda i: ranks[i]) == [[0, 1], [2, 3]]
    assert group.passes(range(4), lambda i: None if i == 1 else "same", lambda i: 16) == [[0, 2, 3], [1]]
