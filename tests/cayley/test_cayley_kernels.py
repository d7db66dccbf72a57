"""The grouped Cayley transform and its backward, through Triton's interpreter (natively on a CUDA machine): against
float64 within the error budget, orthogonality, NaN, determinism, launches, traffic."""

from collections import defaultdict

import pytest
import torch
from budget import check, error
from exact_cayley import KINDS, exact_cayley, extreme_parameters
from launching import DEVICE, poisoned_empty, randn, size
from triton.runtime.interpreter import InterpretedFunction

import lora_fast as lf
from lora_fast.kernels import cayley, pointer_table
from lora_fast.kernels.inspection import interpreter

pytestmark = pytest.mark.gpu

FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16
COUNTED = pytest.mark.skipif(DEVICE.type == "cuda", reason="counted by the interpreter")
NAN_EXPECTED = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy warns in the interpreter
MIXED = [(5, 40, 24), (16, 24, 40), (1, 33, 7), (9, 9, 20), (7, 13, 3), (3, 2100, 530)]  # r, d_in, d_out
EPS = torch.finfo(FLOAT32).eps


def pairs(shapes, dtype=FLOAT32, skew=1.0):
    """Returns free_a and free_b, of the size that they have in training, with the entries of a1 times ``skew``."""
    free_a = [randn(r, d_in, seed=i) / d_in**0.5 for i, (r, d_in, _) in enumerate(shapes)]
    for x in free_a:
        x[:, : len(x)] *= skew
    free_b = [randn(d_out, r, seed=i) / d_out**0.5 for i, (r, _, d_out) in enumerate(shapes)]
    return [x.to(dtype) for x in free_a], [x.to(dtype) for x in free_b]


def make_scales(free_a):
    return [0.5 + randn(len(x), seed=i).square() for i, x in enumerate(free_a)]


def like(tensors, seed=0):
    return [randn(*x.shape, seed=seed + i) for i, x in enumerate(tensors)]


def check_pass(shapes, dtype=FLOAT32, scaled=False):
    """Checks forward and backward against autograd through a float64 transform of the same inputs."""
    lists = free_a, free_b = pairs(shapes, dtype)
    scales = make_scales(free_a) if scaled else None
    with poisoned_empty():
        a, b, inverses = cayley.cayley(*lists, scales)
    grads = like(a), like(b, 50)
    with poisoned_empty():
        da, db, dscales = cayley.cayley_backward(*lists, scales, inverses, *grads)
    assert scaled or dscales is None
    for i in range(len(shapes)):
        free = [
            x[i].double().requires_grad_() for x in (free_a, free_b, scales or [torch.ones(len(x)) for x in free_a])
        ]
        exact_a, exact_b, exact_w = exact_cayley(*free[:2])
        exact_b = exact_b * free[2]
        exact = torch.autograd.grad((exact_a, exact_b), free, [grads[0][i].double(), grads[1][i].double()])
        check(f"a of pair {i}", a[i], exact_a, 0.0, FLOAT32)
        check(f"b of pair {i}", b[i], exact_b, 0.0, FLOAT32)
        check(f"W of pair {i}", inverses[i], exact_w, 1e-13, torch.float64)
        check(f"d free_a of pair {i}", da[i], exact[0], 0.0, dtype)
        check(f"d free_b of pair {i}", db[i], exact[1], 0.0, dtype)
        if scaled:
            check(f"d scale of pair {i}", dscales[i], exact[2], 0.0, FLOAT32)


@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled"])
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
def test_cayley_matches_float64_for_mixed_pairs(dtype, scaled):
    check_pass(MIXED, dtype, scaled)


@pytest.mark.parametrize("r", [17, 33, 64, 72])
def test_cayley_matches_float64_at_every_rank_class(r):
    check_pass([(r, r + 40, 50)])


@pytest.mark.budget
@pytest.mark.parametrize("r", [130, 256])
def test_cayley_matches_float64_at_large_ranks(r):
    check_pass([(r, r + 100, 300)], scaled=True)


def test_cayley_keeps_the_order_of_pairs_of_two_dtypes():
    (a32, b32), (a16, b16) = pairs(MIXED[:3]), pairs(MIXED[:3], BFLOAT16)
    free_a, free_b = [a32[0], a16[1], a32[2]], [b32[0], b16[1], b32[2]]
    results = a, b, inverses = cayley.cayley(free_a, free_b)
    grads = cayley.cayley_backward(free_a, free_b, None, inverses, like(a), like(b))
    assert [x.dtype for x in grads[0]] == [x.dtype for x in free_a]
    alone = [cayley.cayley([a], [b]) for a, b in zip(free_a, free_b, strict=True)]
    for xs, ys in zip(results, zip(*alone, strict=True), strict=True):
        for x, (y,) in zip(xs, ys, strict=True):
            torch.testing.assert_close(x, y)


def orthogonality_defect(a, b):
    """Returns ‖a aᵀ + bᵀb − I‖₁ / (12 r ε)."""
    a, b = a.double(), b.double()
    defect = a @ a.T + b.T @ b - torch.eye(len(a), device=DEVICE)
    return defect.abs().sum(0).max().item() / (12 * len(a) * EPS)


@pytest.mark.parametrize("case", ["skew part of 100", "rows alike"])
def test_factors_are_orthogonal_where_float32_would_lose_eigenvalues(case):
    shapes = [(r, r + 8, 5) for r in (1, 2, 3, 4, 5, 8, 16) for _ in range(3)]
    free_a, free_b = pairs(shapes, skew=100.0 if case == "skew part of 100" else 1.0)
    if case == "rows alike":
        free_a = [10 * (0.1 * x + 0.9 * x[:1]) for x in free_a]
        free_b = [10 * (0.1 * x + 0.9 * x[:, :1]) for x in free_b]
    a, b, _ = cayley.cayley(free_a, free_b)
    assert max(map(orthogonality_defect, a, b)) <= 1


@pytest.mark.parametrize("r", [1, 4, 16, 33, 80])
@pytest.mark.parametrize("kind", KINDS)
def test_parameters_of_ten_thousand_keep_values_and_gradients(kind, r):
    """As the twin's test of the same name."""
    lists = [list(x) for x in zip(*(extreme_parameters(kind, 1e4, r, r + d, 48) for d in (0, 64)), strict=True)]
    a, b, inverses = cayley.cayley(*lists)
    grads = like(a), like(b, 50)
    da, db, _ = cayley.cayley_backward(*lists, None, inverses, *grads)
    for i in range(2):
        free = [x[i].double().requires_grad_() for x in lists]
        exact = exact_cayley(*free)[:2]
        exact_grads = torch.autograd.grad(exact, free, [grads[0][i].double(), grads[1][i].double()])
        assert torch.linalg.matrix_norm(2 * (b[i].double() @ a[i].double()), 2) <= 1 + 1e-6
        assert torch.linalg.matrix_norm(2 * (b[i] @ a[i] - exact[1] @ exact[0]), 2) <= 1e-3
        assert error(da[i], exact_grads[0]) <= 5e-3 and error(db[i], exact_grads[1]) <= 5e-3


@NAN_EXPECTED
@pytest.mark.parametrize("which", [0, 1], ids=["free_a", "free_b"])
def test_nan_affects_only_its_pair(which):
    lists = pairs(MIXED[:4])
    grads = like(lists[0]), like(lists[1])

    def run():
        a, b, inverses = cayley.cayley(*lists)
        return [a, b, *cayley.cayley_backward(*lists, None, inverses, *grads)[:2]]

    clean = run()
    lists[which][1][-1, -1] = float("nan")
    for results, before in zip(run(), clean, strict=True):
        assert results[1].isnan().all()
        assert all(torch.equal(results[i], before[i]) for i in (0, 2, 3))


def test_same_inputs_give_the_same_bits():
    lists = pairs([(3, 4200, 60)])
    grads = like(lists[0]), like(lists[1])

    def run():
        a, b, inverses = cayley.cayley(*lists)
        return [a, b, inverses, *cayley.cayley_backward(*lists, None, inverses, *grads)[:2]]

    assert all(torch.equal(x[0], y[0]) for x, y in zip(run(), run(), strict=True))


def test_few_programs_give_the_bits_of_many(monkeypatch):
    lists = pairs(MIXED)
    all_at_once = cayley.cayley(*lists)
    monkeypatch.setattr(cayley, "SLOTS", 2)
    for xs, ys in zip(all_at_once, cayley.cayley(*lists), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(xs, ys, strict=True))


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
def test_graph_capture_needs_no_address_from_the_host(dtype, monkeypatch):
    """A captured call reads what the call before left on the device, although all tensors but the parameters moved. A
    parameter that has moved is an error."""
    monkeypatch.setattr(pointer_table, "_captured", {})
    lists = pairs(MIXED[:4], dtype)
    alive = []  # all tensors, so that none gets the address of another

    def run():
        scales = make_scales(lists[0])
        a, b, inverses = cayley.cayley(*lists, scales)
        grads = like(a), like(b, 50)
        alive.append((scales, a, b, inverses, grads))
        da, db, dscales = cayley.cayley_backward(*lists, scales, inverses, *grads)
        return [*a, *b, *inverses, *da, *db, *dscales]

    outside = run()
    with monkeypatch.context() as patch:
        patch.setattr(pointer_table, "capturing", lambda: True)
        patch.setattr(pointer_table, "to_device", None)
        within = run()
        with monkeypatch.context() as outside_again:
            outside_again.setattr(pointer_table, "capturing", lambda: False)
            for i in range(pointer_table.CACHE_SIZE + 1):
                [pointer_table.cached(kind, [DEVICE, i], object) for kind in ("table", "offsets", "addresses")]
        run()  # a graph's tables are still cached
        for tensors in lists:
            tensors[0] = tensors[0].clone()
        with pytest.raises(RuntimeError, match="a CUDA graph is being captured"):
            run()
    assert all(torch.equal(x, y) for x, y in zip(outside, within, strict=True))


@pytest.mark.skipif(DEVICE.type != "cuda", reason="captures a CUDA graph")
def test_graph_replay_follows_the_parameters():
    lists = pairs(MIXED)

    def run():
        scales = [x.square() + 1 for x in scales_in]
        a, b, inverses = cayley.cayley(*lists, scales)
        grads = cayley.cayley_backward(*lists, scales, inverses, [x.sin() for x in a], [x.cos() for x in b])
        return [x for xs in (a, b, *grads) for x in xs]

    scales_in = make_scales(lists[0])
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="relaxed"):  # a kernel may be compiled at its first capture
        captured = run()
    for tensors in (*lists, scales_in):
        torch._foreach_mul_(tensors, 1.25)
    graph.replay()
    assert all(torch.equal(x, y) for x, y in zip(captured, run(), strict=True))


def test_unaligned_gradients_give_the_same_bits():
    lists = pairs([(8, 64, 32)])
    a, b, inverses = cayley.cayley(*lists)
    plain = cayley.cayley_backward(*lists, None, inverses, a, b)
    grads = [torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape) for x in (a[0], b[0])]
    assert all(x.data_ptr() % 16 for x in grads), "the gradients are aligned"
    shifted = cayley.cayley_backward(*lists, None, inverses, grads[:1], grads[1:])
    assert all(torch.equal(x[0], y[0]) for x, y in zip(plain[:2], shifted[:2], strict=True))


def test_cayley_accepts_no_pairs():
    assert cayley.cayley([], []) == ([], [], [])
    assert cayley.cayley_backward([], [], None, [], [], []) == ([], [], None)


def test_autograd_runs_the_kernels():
    """Gradients are those of the twin, although one pair has none and one result of another has none."""
    grads = {}
    for name in ("torch", "triton"):
        free_a, free_b = ([x.requires_grad_() for x in xs] for xs in pairs(MIXED[:3]))
        with lf.set_backend(name), interpreter.traffic() as counted:
            a, b = lf.functional.cayley(free_a, free_b)
            (a[0].square().sum() + b[0].cos().sum() + b[2].sum()).backward()
        assert len(counted.launches) == (6 if name == "triton" and DEVICE.type == "cpu" else 0)
        assert free_a[1].grad is None and free_b[1].grad is None
        grads[name] = [x.grad for i in (0, 2) for x in (free_a[i], free_b[i])]
    torch.testing.assert_close(grads["triton"], grads["torch"])


@COUNTED
@pytest.mark.parametrize("n", [1, 24, 224])
def test_launches_do_not_grow_with_pairs(n, monkeypatch):
    monkeypatch.setattr(InterpretedFunction, "run", lambda *args, **kwargs: None)  # launches are counted, not run
    lists = pairs([(2 + i % 3, 16 + 8 * (i % 2), 8) for i in range(n)])
    with interpreter.traffic() as counted:
        a, b, inverses = cayley.cayley(*lists)
        cayley.cayley_backward(*lists, None, inverses, a, b)
    names = ["sums", "inverse", "products", "sums", "backward", "products"]
    assert counted.launches == [f"lora_cayley_{name}_kernel" for name in names]


@COUNTED
@pytest.mark.parametrize("r, d", [(16, 4096), (64, 4096)])
def test_traffic_is_minimal(r, d, monkeypatch):
    """Each way passes over the factors twice, with at most 1.05 of every operand once in each. The r×r work, which also
    writes the first r columns of a, stays in a cache and is left out."""
    for name in ("inverse", "backward"):
        monkeypatch.setattr(cayley, f"lora_cayley_{name}_kernel", defaultdict(lambda: lambda *args, **kwargs: None))
    lists, inverses = ([torch.zeros(r, d)], [torch.zeros(d, r)]), [torch.zeros(r, r, dtype=torch.float64)]
    forward, backward = lambda: cayley.cayley(*lists), lambda: cayley.cayley_backward(*lists, None, inverses, *lists)
    for run, operands in ((forward, 3), (backward, 5)):
        with interpreter.traffic() as counted:
            run()
        minimum = operands * size(*lists[0], *lists[1])
        assert minimum - size(*inverses) <= counted.total <= 1.05 * minimum, f"{counted.total / minimum:.4f}"


@pytest.mark.parametrize(
    "a, b, dtype",
    [((3, 2), (4, 3), FLOAT32), ((3, 5), (4, 2), FLOAT32), ((3, 5), (4, 3), BFLOAT16), ((257, 300), (4, 257), FLOAT32)],
    ids=["r > d_in", "two ranks", "two dtypes", "r > 256"],
)
def test_assertion_names_a_bad_pair(a, b, dtype):
    with pytest.raises(AssertionError, match="pair 0: expected free_a"):
        cayley.cayley([torch.ones(a, device=DEVICE)], [torch.ones(b, dtype=dtype, device=DEVICE)])


@pytest.mark.parametrize(
    "scale", [torch.ones(4), torch.ones(3, dtype=BFLOAT16), torch.ones(6)[::2]], ids=["length", "dtype", "strided"]
)
def test_assertion_names_a_bad_scale(scale):
    with pytest.raises(AssertionError, match="scale 0: expected contiguous float32"):
        cayley.cayley(*pairs([(3, 5, 4)]), [scale.to(DEVICE)])
