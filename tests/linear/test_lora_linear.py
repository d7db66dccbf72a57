"""Tests of functional.lora_linear and LoRALinear as a user of nn.Linear sees them."""

import copy
import io
import pickle
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from budget import DRAWS, check, eager_lora_linear, error, least_error
from torch import nn
from torch._dynamo import compiled_autograd
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import lora_fast as lf
from lora_fast.functional import linear as functional_linear
from lora_fast.functional import lora_linear
from lora_fast.kernels import linear as kernel_layer
from lora_fast.kernels import tiles
from lora_fast.ops import linear as linear_op
from lora_fast.ops import seeds
from lora_fast.ops.reference import linear as reference

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BACKENDS = ["torch", "triton"]


def tensors(dtype=torch.float32, adapter=None, shape=(2, 3, 10), d_out=12, r=4, bias=True) -> dict:
    torch.manual_seed(0)
    make = lambda *size, kind: torch.randn(*size).to(DEVICE, kind)
    return {
        "x": make(*shape, kind=dtype).requires_grad_(),
        "weight": make(d_out, shape[-1], kind=dtype),
        "bias": make(d_out, kind=dtype) if bias else None,
        "lora_A": make(r, shape[-1], kind=adapter or dtype).requires_grad_(),
        "lora_B": make(d_out, r, kind=adapter or dtype).requires_grad_(),
    }


def layer_of(dtype=torch.float32, dropout=0.0) -> lf.LoRALinear:
    torch.manual_seed(0)
    layer = lf.LoRALinear(10, 12, r=4, alpha=8, dropout=dropout, dtype=dtype, device=DEVICE)
    nn.init.normal_(layer.lora_B)
    return layer


def gradients(layer, x, run=None) -> list[torch.Tensor]:
    x = x.detach().clone().requires_grad_()
    layer.zero_grad()
    torch.manual_seed(7)
    (layer if run is None else run)(x).pow(2).sum().backward()
    return [x.grad, layer.lora_A.grad.clone(), layer.lora_B.grad.clone()]


# ── results ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("shape", [(10,), (5, 10), (2, 3, 10), (0, 10)], ids=str)
def test_gradcheck(shape, dropout_p, bias):
    t = tensors(torch.float64, shape=shape, bias=bias)
    if bias:
        t["bias"].requires_grad_()
    weight = t.pop("weight")
    inputs = list(t.values())
    call = lambda x, b, lora_A, lora_B: lora_linear(x, weight, b, lora_A, lora_B, 1.5, dropout_p, seed=11)
    with lf.set_backend("torch"):
        assert torch.autograd.gradcheck(call, inputs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("adapter", [None, torch.float32], ids=["same", "float32 adapters"])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_results_have_eagers_dtypes_and_are_within_the_budget(dtype, autocast, adapter, backend):
    """The output has nn.Linear's dtype. The error budget is that of the dtype in which a result is computed."""
    t = tensors(dtype, adapter, shape=(2, 40, 40), d_out=48)
    computed_in = autocast or dtype

    def run(kind, call, scale=1.0):
        trained = ("x", "lora_A", "lora_B")
        leaves = {k: v.detach().to(kind or v.dtype).requires_grad_(k in trained) for k, v in t.items()}
        y = call(leaves["x"] * scale, *list(leaves.values())[1:], 1.5)
        y.sum().backward()
        return y.detach(), leaves["x"].grad, leaves["lora_A"].grad, leaves["lora_B"].grad

    with torch.autocast(DEVICE.type, autocast or torch.bfloat16, enabled=autocast is not None):
        linear = torch.nn.functional.linear(t["x"], t["weight"], t["bias"])
        with lf.set_backend(backend):
            got = run(None, lora_linear)
        to = lambda *tensors: [tensor if autocast is None else tensor.to(autocast) for tensor in tensors]
        cast = lambda *tensors: eager_lora_linear(*to(*tensors[:-1]), tensors[-1])
        with torch.autocast(DEVICE.type, enabled=False):
            eager = [run(None, cast, 1 + draw / DRAWS) for draw in range(DRAWS)]
            exact = [run(torch.float64, eager_lora_linear, 1 + draw / DRAWS) for draw in range(DRAWS)]
    assert got[0].dtype == linear.dtype == computed_in
    for i, name in enumerate(("y", "dx", "da", "db")):
        assert got[i].dtype == eager[0][i].dtype, name
        allowed = max(error(draw[i], exact_draw[i]) for draw, exact_draw in zip(eager, exact, strict=True))
        exactly = autocast is None and i >= 2
        least = least_error(dtype, got[i].dtype) if exactly else 0.0
        check(name, got[i], exact[0][i], allowed, got[i].dtype if exactly else computed_in, least)


def test_same_mask_in_forward_and_backward():
    """With x = 1, a = b = I and W = 0 both y and dx are the scaled mask."""
    eye = torch.eye(8, device=DEVICE)
    for backend in BACKENDS:
        x = torch.ones(50, 8, device=DEVICE, requires_grad=True)
        with lf.set_backend(backend):
            y = lora_linear(x, torch.zeros(8, 8, device=DEVICE), None, eye, eye, 1.0, 0.5)
        y.sum().backward()  # outside the context: backward uses forward's backend
        assert torch.equal(x.grad, y) and set(y.unique().tolist()) == {0.0, 2.0}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_masks_of_the_torch_ops_multiply_like_bools(dtype):
    """Infinite values and the signs of zeros included."""
    x, weight, ds, a = (torch.randn(s, dtype=dtype, device="cpu") for s in ((6, 10), (12, 10), (6, 4), (4, 10)))
    x[0, :3] = torch.tensor([float("inf"), -0.0, float("nan")])
    dy, keep = torch.randn(6, 12, dtype=dtype, device="cpu"), reference.draw_mask(x, 0.5, 1)
    for result, expected in (
        (reference.project(x, a, keep), torch.nn.functional.linear(x * keep, a)),
        (reference.grad_a(x, ds, a, keep), ds.t() @ (x * keep)),
        (reference.grad_x(dy, weight, ds, a, keep), dy @ weight + (ds @ a) * keep),
    ):
        torch.testing.assert_close(result, expected, rtol=0, atol=0, equal_nan=True)


def test_seed_determines_the_mask():
    t = tensors()
    run = lambda seed: lora_linear(*t.values(), 1.0, 0.5, seed)
    assert torch.equal(run(5), run(5)) and not torch.equal(run(5), run(6))
    torch.manual_seed(1)
    first = run(None)
    assert not torch.equal(first, run(None))
    torch.manual_seed(1)
    assert torch.equal(first, run(None))


# ── tensors saved, gradients computed ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
def test_forward_saves_x_and_s_only(dropout_p, autocast, backend):
    t = tensors(r=4)
    parameters = {v.data_ptr() for k, v in t.items() if v is not None and k != "x"}
    kept = {}
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda v: kept.setdefault(v.data_ptr(), v), lambda v: v)
    with hooks, torch.autocast(DEVICE.type, torch.bfloat16, enabled=autocast), lf.set_backend(backend):
        lora_linear(*t.values(), 1.5, dropout_p)
    saved = [v for address, v in kept.items() if address not in parameters]
    assert sorted(tuple(v.shape) for v in saved) == [(2, 3, 10), (6, 4)]
    assert all(v.element_size() == (2 if autocast else 4) for v in saved)


@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_for_db_alone_draws_no_mask(backend, monkeypatch):
    """S already contains the mask. The gradient equals the one that is computed together with the others."""
    gradients = []
    for alone in (False, True):
        t = tensors()
        t["x"].requires_grad_(not alone), t["lora_A"].requires_grad_(not alone)
        with lf.set_backend(backend):
            y = lora_linear(*t.values(), 1.5, 0.4, 7)
        if alone:
            for module in (reference, kernel_layer):
                monkeypatch.setattr(module, "draw_mask", lambda *arguments: pytest.fail("a mask was drawn"))
        y.sum().backward()
        gradients.append(t["lora_B"].grad)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("backend", BACKENDS)
def test_float32_adapters_save_at_most_one_percent_more(backend):
    """S is float32 then. With 4096 columns of x and r = 16 that adds at most 1 %."""
    sizes = []
    for adapter in (torch.bfloat16, torch.float32):
        t, kept = tensors(torch.bfloat16, adapter, shape=(4, 4096), d_out=4096, r=16, bias=False), {}
        parameters = {v.data_ptr() for k, v in t.items() if v is not None and k != "x"}
        keep = lambda v, kept=kept: kept.setdefault(v.data_ptr(), v)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda v: v), lf.set_backend(backend):
            lora_linear(*t.values(), 1.5)
        sizes.append(sum(v.nbytes for address, v in kept.items() if address not in parameters))
    assert sizes[0] == 4 * (4096 + 16) * 2 and sizes[0] < sizes[1] <= 1.01 * sizes[0]


@pytest.mark.parametrize("frozen", [("x",), ("lora_A",), ("lora_B",), ("x", "lora_A"), ("x", "lora_B")], ids="+".join)
def test_backward_computes_only_needed_gradients(frozen, monkeypatch):
    called = []
    for name in ("grad_s_b", "grad_a", "grad_x"):
        twin = getattr(reference, name)
        record = lambda *a, twin=twin, name=name: called.append((name, *a[4:6])) or twin(*a)
        monkeypatch.setattr(reference, name, record)
    t = tensors()
    for name in frozen:
        t[name].requires_grad_(False)
    with lf.set_backend("torch"):
        lora_linear(*t.values(), 1.0).sum().backward()
    need = {name: name not in frozen for name in ("x", "lora_A", "lora_B")}
    expected = [("grad_s_b", need["x"] or need["lora_A"], need["lora_B"])]
    expected += [("grad_a",)] * need["lora_A"] + [("grad_x", None)] * need["x"]
    assert [call if call[0] != "grad_a" else call[:1] for call in called] == expected
    assert all((t[name].grad is not None) == needed for name, needed in need.items())


def test_no_grad_saves_nothing():
    with torch.no_grad():
        assert lora_linear(*tensors().values(), 1.0).grad_fn is None


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_gradients_are_differentiable_again(dropout_p):
    t = tensors(torch.float64, shape=(2, 2, 5), d_out=3, r=2)
    weight, inputs = t.pop("weight"), list(t.values())
    t["bias"].requires_grad_()
    call = lambda x, b, lora_A, lora_B: lora_linear(x, weight, b, lora_A, lora_B, 1.5, dropout_p, seed=11).sin()
    with lf.set_backend("torch"):
        assert torch.autograd.gradgradcheck(call, inputs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("adapter", [None, torch.float32], ids=["same", "float32 adapters"])
@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
def test_differentiable_gradients_are_those_of_the_op(autocast, adapter, backend):
    """With create_graph=True plain torch ops compute them, with the same mask and to the same precision."""
    t = tensors(torch.bfloat16 if adapter else torch.float32, adapter, shape=(2, 40, 40), d_out=48)
    with lf.set_backend(backend), torch.autocast(DEVICE.type, torch.bfloat16, enabled=autocast):
        y = lora_linear(*t.values(), 1.5, 0.4, 11)
    inputs = [t["x"], t["lora_A"], t["lora_B"]]
    dy = torch.randn_like(y)
    plain = torch.autograd.grad(y, inputs, dy, retain_graph=True)
    again = torch.autograd.grad(y, inputs, dy, create_graph=True)
    tolerance = 5e-3 if autocast or adapter else 1e-5
    for g, h in zip(plain, again, strict=True):
        assert h.grad_fn is not None and h.dtype == g.dtype and (g - h).norm() <= tolerance * g.norm()


def test_in_place_change_between_forward_and_backward_raises():
    t = tensors()
    y = lora_linear(*t.values(), 1.0)
    with torch.no_grad():
        t["lora_B"].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_checkpointing_gives_the_same_bits(backend, reentrant, dropout):
    layer, x = layer_of(dropout=dropout), torch.randn(2, 5, 10, device=DEVICE)
    with lf.set_backend(backend):
        plain = gradients(layer, x)
        again = gradients(layer, x, lambda x: checkpoint(layer, x, use_reentrant=reentrant))
    assert all(torch.equal(g, h) for g, h in zip(plain, again, strict=True))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("thin", ["pass", "cublas", "split"])
def test_selective_checkpointing_keeps_products_and_gradients(thin, dropout):
    """The products that it keeps are used a second time, so no kernel may have added to them in place."""
    layer, x = layer_of(dropout=dropout), torch.randn(2, 5, 10, device=DEVICE)
    kept = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default]
    contexts = partial(create_selective_checkpoint_contexts, kept)
    run = lambda x: checkpoint(layer, x, use_reentrant=False, context_fn=contexts)
    with lf.set_backend("triton"), tiles.assume(strategy="cublas", thin=thin):
        plain, again = gradients(layer, x), gradients(layer, x, run)
    assert all(torch.equal(g, h) for g, h in zip(plain, again, strict=True))


# ── torch.compile and torch.library ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_compiled_layer_gives_eagers_gradients(dropout, backend):
    layer, x = layer_of(dropout=dropout), torch.randn(2, 5, 10, device=DEVICE)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with lf.set_backend(backend):
        got, expected = gradients(layer, x, compiled), gradients(layer, x)
        if dropout:  # a compiled layer draws another seed than an eager one, so two compiled calls are compared
            expected = gradients(layer, x, compiled)
    assert all(torch.equal(g, h) for g, h in zip(got, expected, strict=True))


def test_compiled_layer_gives_eagers_gradients_under_autocast():
    layer, x = layer_of(), torch.randn(2, 5, 10, device=DEVICE)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        got, expected = gradients(layer, x, compiled), gradients(layer, x)
    assert all(torch.equal(g, h) for g, h in zip(got, expected, strict=True))


@pytest.mark.parametrize(  # every pair of two values
    "adapter, dropout_p, backend",
    [(None, 0.0, "torch"), (None, 0.3, "triton"), (torch.float32, 0.0, "triton"), (torch.float32, 0.3, "torch")],
)
def test_custom_ops_pass_opcheck(adapter, dropout_p, backend):
    t = tensors(torch.float16 if adapter else torch.float32, adapter)
    seed = torch.tensor(5, device=DEVICE) if dropout_p else None
    triton = backend == "triton"
    for rounded in (False, True):
        torch.library.opcheck(linear_op.lora_linear_op, (*t.values(), 1.5, dropout_p, seed, rounded, triton))
    detached = [v.detach() for k, v in t.items() if k != "bias"]
    x, weight, lora_A, lora_B = detached
    dy, s = torch.randn(2, 3, 12, device=DEVICE).to(x.dtype), torch.randn(6, 4, device=DEVICE)
    transposed = [factor.T.contiguous().T for factor in (lora_A, lora_B)]  # as SingLoRA's a is
    for needs in ([True, True, True], [False, True, False]):
        for factors in ([lora_A, lora_B], transposed):
            args = (dy, x, s, weight, *factors, 1.5, dropout_p, seed, False, triton, needs)
            torch.library.opcheck(linear_op.lora_linear_backward_op, args)


# ── the torch ops on a GPU ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def gpu_without_kernels(monkeypatch):
    """Stands in for a GPU on which the torch ops run: tensors are on a CPU, but dropout gets its mask as on a GPU."""
    draw = lambda x, dropout_p, seed, traced, triton: linear_op.bernoulli_mask(x, dropout_p)
    monkeypatch.setattr(functional_linear, "mask_seed", draw)
    with lf.set_backend("torch"):
        yield


@pytest.mark.parametrize("captured", [False, True], ids=["eager", "captured"])
def test_torch_ops_on_a_gpu_never_wait_for_it(captured, monkeypatch):
    """Fake tensors know shapes, dtypes and devices alone: reading one on the host is an error."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: captured)
    with FakeTensorMode(), lf.set_backend("torch"):  # no autograd, whose nodes need the device
        make = lambda *shape, dtype=torch.bfloat16: torch.randn(*shape, device="cuda", dtype=dtype)
        x, weight, a, b = make(2, 5, 10), make(12, 10), make(4, 10, dtype=torch.float32), make(12, 4)
        mask = functional_linear.mask_seed(x, 0.5, None, False, False)
        constants = 2.0, 0.5, mask, False
        y, s = linear_op.forward(reference, x, weight, make(12), a, b, *constants)
        grads = linear_op.backward(reference, y, x, s, weight, a, b, *constants, (True, True, True))
    assert mask.shape == (10, 10) and mask.nbytes == 100
    assert all(tensor.device.type == "cuda" for tensor in (mask, y, *grads))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_torch_ops_on_a_gpu_compute_pefts_formula_with_their_mask(gpu_without_kernels, dtype):
    t = tensors(dtype, shape=(40, 10))
    state = torch.get_rng_state()
    y = lora_linear(*t.values(), 1.5, 0.4)
    dy = torch.randn_like(y)
    got = [y.detach(), *torch.autograd.grad(y, [t["x"], t["lora_A"], t["lora_B"]], dy)]
    torch.set_rng_state(state)
    keep = linear_op.bernoulli_mask(t["x"], 0.4).double() * reference.keep_scale(0.4)
    x, weight, bias, a, b = (v.detach().double().requires_grad_() for v in t.values())
    exact_y = nn.functional.linear(x, weight, bias) + 1.5 * (x * keep) @ a.T @ b.T
    exact = [exact_y.detach(), *torch.autograd.grad(exact_y, [x, a, b], dy.double())]
    tolerance = 1e-12 if dtype is torch.float64 else 0.03
    assert all((g.double() - h).norm() <= tolerance * h.norm() for g, h in zip(got, exact, strict=True))


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_torch_ops_on_a_gpu_keep_one_byte_an_element_or_none_with_checkpointing(gpu_without_kernels, reentrant):
    layer, x = layer_of(dropout=0.3), torch.randn(6, 10, device=DEVICE)
    plain = gradients(layer, x)
    again = gradients(layer, x, lambda x: checkpoint(layer, x, use_reentrant=reentrant))
    assert all(torch.equal(g, h) for g, h in zip(plain, again, strict=True))
    masks = []
    note = lambda v: masks.append(v) or v
    with torch.autograd.graph.saved_tensors_hooks(note, lambda v: v):
        layer(x.requires_grad_())
        masks = [v for v in masks if v.dtype is torch.bool]
        assert [mask.nbytes for mask in masks] == [60]


def test_torch_ops_on_a_gpu_compile(gpu_without_kernels):
    layer, x = layer_of(dropout=0.3), torch.randn(2, 5, 10, device=DEVICE)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    got, again, eager = gradients(layer, x, compiled), gradients(layer, x, compiled), gradients(layer, x)
    assert all(torch.equal(g, h) for g, h in zip(got, again, strict=True))
    assert all(torch.allclose(g, h) for g, h in zip(got, eager, strict=True))
    t = tensors()
    mask = linear_op.bernoulli_mask(t["x"], 0.3)
    torch.library.opcheck(linear_op.lora_linear_op, (*t.values(), 1.5, 0.3, mask, False, False))


@pytest.mark.parametrize("dropout_p", [0.0, 0.1, 1.0])
def test_mask_on_a_gpu_has_the_probability_and_a_generators_seed_repeats_it(dropout_p):
    x = torch.empty(300, 100, device=DEVICE)
    first, again = (linear_op.bernoulli_mask(x, dropout_p, torch.Generator(DEVICE).manual_seed(3)) for _ in range(2))
    assert torch.equal(first, again) and first.dtype is torch.bool
    assert abs(first.double().mean().item() - (1 - dropout_p)) <= 5 * (dropout_p * (1 - dropout_p) / 30000) ** 0.5


def test_seed_of_a_graph_of_the_torch_ops_on_a_gpu_is_refused():
    with FakeTensorMode(), lf.set_backend("torch"), pytest.raises(lf.ArgumentError, match="seed: expected None"):
        functional_linear.mask_seed(torch.empty(3, 10, device="cuda"), 0.5, 7, True, False)


def test_seed_of_a_layer_on_a_gpu_comes_from_its_generator(monkeypatch):
    """Nothing is taken from the CPU's generator, which orders the user's data."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(seeds, "from_offset", lambda generator: generator)
    monkeypatch.setattr(torch.cuda, "default_generators", (11, 22))
    before = torch.get_rng_state()
    with FakeTensorMode():
        drawn = [
            functional_linear.mask_seed(torch.empty(3, 10, device=f"cuda:{i}"), 0.5, None, False, True)
            for i in range(2)
        ]
        in_graph = functional_linear.mask_seed(torch.empty(3, 10, device="cuda:1"), 0.5, None, True, True)
    assert drawn == [11, 22] and torch.equal(torch.get_rng_state(), before)
    assert in_graph.device.index == 1 and in_graph.dtype is torch.int64 and in_graph.dim() == 0


# ── compiled autograd ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_compiled_autograd_gives_eagers_gradients(dropout, backend):
    """It traces the backward of eager forwards into one graph. Several steps, because their seeds differ."""
    layer = layer_of(dropout=dropout)
    compile_backward = partial(torch.compile, backend="eager", fullgraph=True)
    results = []
    torch._dynamo.reset()
    for compiled in (False, True):
        torch.manual_seed(3)
        gradients = []
        with lf.set_backend(backend):
            for _ in range(4):
                layer.zero_grad()
                x = torch.randn(2, 5, 10, device=DEVICE, requires_grad=True)
                loss = layer(layer(x)[..., :10]).pow(2).sum()
                with compiled_autograd._enable(compile_backward) if compiled else nullcontext():
                    loss.backward()
                gradients += [x.grad, layer.lora_A.grad.clone(), layer.lora_B.grad.clone()]
        results.append(gradients)
    assert all(torch.equal(g, h) for g, h in zip(*results, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_layer_with_compiled_autograd_uses_one_mask(backend):
    layer = lf.LoRALinear(10, 12, r=4, alpha=8, dropout=0.5, bias=False, device=DEVICE)
    nn.init.normal_(layer.lora_B)
    torch._dynamo.reset()
    with lf.set_backend(backend), torch._dynamo.config.patch(compiled_autograd=True):
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        for _ in range(2):
            layer.zero_grad()
            x = torch.randn(20, 10, device=DEVICE, requires_grad=True)
            y = compiled(x)
            dy = torch.randn_like(y)
            y.backward(dy)
            added = (dy * (y.detach() - x.detach() @ layer.weight.T)).sum()
            for p in (layer.lora_A, layer.lora_B):
                torch.testing.assert_close((p * p.grad).sum(), added, rtol=1e-4, atol=1e-4)


# ── the module ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_new_layer_gives_its_linears_output():
    linear = nn.Linear(10, 12, device=DEVICE)
    layer = lf.LoRALinear.from_linear(linear, r=4, alpha=8, dropout=0.5)
    x = torch.randn(3, 10, device=DEVICE)
    assert torch.equal(layer(x), linear(x))
    assert layer.weight is linear.weight and layer.bias is linear.bias and not layer.weight.requires_grad


@pytest.mark.parametrize("dtype, adapter", [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)], ids=str)
def test_adapter_is_float32_over_a_16_bit_weight(dtype, adapter):
    layer = lf.LoRALinear.from_linear(nn.Linear(10, 12, dtype=dtype), r=2, alpha=2)
    assert layer.lora_A.dtype == layer.lora_B.dtype == adapter and layer.weight.dtype == dtype


@pytest.mark.parametrize("use_rslora, scaling", [(False, 2.0), (True, 4.0)])
def test_scaling_is_alpha_over_r_or_over_its_root(use_rslora, scaling):
    assert lf.LoRALinear(10, 12, r=4, alpha=8, use_rslora=use_rslora).scaling == scaling


def test_state_dict_has_four_tensors_and_two_are_trainable():
    layer = layer_of()
    assert list(layer.state_dict()) == ["weight", "bias", "lora_A", "lora_B"]
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["lora_A", "lora_B"]
    other = lf.LoRALinear(10, 12, r=4, alpha=8, device=DEVICE)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(3, 10, device=DEVICE)
    assert torch.equal(other(x), layer(x))


def through_torch_save(layer):
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), through_torch_save])
@pytest.mark.parametrize("merged", [False, True], ids=["plain", "merged"])
def test_copy_gives_the_same_output_and_shares_no_parameter(copied, merged):
    layer = layer_of(dropout=0.2).eval()
    if merged:
        layer.merge()
    other, x = copied(layer), torch.randn(3, 10, device=DEVICE)
    assert torch.equal(other(x), layer(x)) and other.lora_A is not layer.lora_A and repr(other) == repr(layer)
    if merged:
        layer.unmerge(), other.unmerge()
        assert torch.equal(layer.weight, other.weight)


def test_dropout_is_active_in_training_only():
    layer, x = layer_of(dropout=0.5), torch.randn(3, 10, device=DEVICE)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    expected = eager_lora_linear(x, layer.weight, layer.bias, layer.lora_A, layer.lora_B, layer.scaling)
    torch.testing.assert_close(layer(x), expected)


def test_layer_converts_to_another_dtype_and_device():
    layer = layer_of().to(torch.bfloat16)
    assert {p.dtype for p in layer.parameters()} == {torch.bfloat16}
    assert layer(torch.randn(3, 10, device=DEVICE).bfloat16()).dtype == torch.bfloat16
    assert {p.device.type for p in layer.to("meta").parameters()} == {"meta"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_merge_rounds_once_and_unmerge_restores_every_bit(dtype):
    layer = layer_of().to(dtype)
    before = layer.weight.clone()
    exact = before.double() + layer.scaling * layer.lora_B.double() @ layer.lora_A.double()
    layer.merge()
    spacing = (exact.abs() * torch.finfo(dtype).eps).clamp_min(torch.finfo(dtype).tiny)
    assert ((layer.weight.double() - exact).abs() <= 0.51 * spacing + 2e-6 * (dtype == torch.float32)).all()
    x = torch.randn(3, 10, device=DEVICE).to(dtype)
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    layer.unmerge()
    assert torch.equal(layer.weight, before)


def test_forward_hooks_run():
    layer, seen = layer_of(), []
    layer.register_forward_hook(lambda module, args, y: seen.append(tuple(y.shape)))
    layer(torch.randn(3, 10, device=DEVICE))
    assert seen == [(3, 12)]


# ── bad input ────────────────────────────────────────────────────────────────────────────────────────────────────────

BAD_ARGUMENTS = {
    "x": [torch.zeros(3, 9), torch.zeros(()), torch.zeros(3, 10, dtype=torch.int64), torch.zeros(3, 10).half(), None],
    "weight": [torch.zeros(12), torch.zeros(12, 10).cfloat(), torch.zeros(12, 10, requires_grad=True), "W"],
    "bias": [torch.zeros(11), torch.zeros(12, 1), torch.zeros(12).bfloat16(), 3.0],
    "lora_A": [torch.zeros(4, 9), torch.zeros(0, 10), torch.zeros(257, 10), torch.zeros(4, 10, device="meta")],
    "lora_B": [torch.zeros(12, 5), torch.zeros(4, 12), torch.zeros(12, 4, dtype=torch.int8), None],
    "scaling": [float("nan"), float("inf"), "2", None],
    "dropout_p": [-0.1, 1.5, float("nan"), "0.1", None],
    "seed": [-1, 1 << 62, 0.5],
}
BAD = [(name, value) for name, values in BAD_ARGUMENTS.items() for value in values]


@pytest.mark.parametrize("name, value", BAD, ids=[f"{name} {i}" for i, (name, _) in enumerate(BAD)])
def test_bad_argument_raises_an_error_that_names_it(name, value, monkeypatch):
    monkeypatch.setattr(linear_op, "forward", lambda *args: pytest.fail("a kernel was started"))
    arguments = {**tensors(), "scaling": 1.0, "dropout_p": 0.5, "seed": 1}
    arguments[name] = value.to(DEVICE) if isinstance(value, torch.Tensor) and not value.is_meta else value
    blamed = "lora_B" if name == "lora_A" and getattr(value, "shape", ())[:1] == (5,) else name
    with pytest.raises(lf.ArgumentError, match=rf"^{blamed}: expected .+, got .+"):
        lora_linear(**arguments)


@pytest.mark.parametrize(
    "name, value",
    [("r", 0), ("r", 257), ("r", 2.0), ("r", True), ("alpha", 0), ("alpha", float("nan")), ("alpha", float("inf"))]
    + [("dropout", -0.1), ("dropout", 1.1), ("dropout", float("nan")), ("init", "zeros")],
    ids=str,
)
def test_bad_setting_raises_an_error_that_names_it(name, value):
    with pytest.raises(lf.ArgumentError, match=rf"^{name}: expected .+, got "):
        lf.LoRALinear(10, 12, **{"r": 4, "alpha": 8, name: value})


@pytest.mark.parametrize("linear", [nn.Conv1d(10, 12, 1), nn.Linear(10, 12, dtype=torch.cfloat), None])
def test_from_linear_rejects_other_modules(linear):
    with pytest.raises(lf.ArgumentError, match=r"^linear"):
        lf.LoRALinear.from_linear(linear, r=4, alpha=8)


def test_backend_errors_name_the_cause(monkeypatch):
    with pytest.raises(lf.ArgumentError, match="backend: expected one of auto, triton, torch, got 'cuda'"):
        lf.set_backend("cuda")
    with lf.set_backend("triton"), pytest.raises(lf.BackendError, match="float64"):
        lora_linear(*tensors(torch.float64).values(), 1.0)
    if DEVICE.type == "cpu":
        monkeypatch.delenv("TRITON_INTERPRET")
        with lf.set_backend("triton"), pytest.raises(lf.BackendError, match="TRITON_INTERPRET=1"):
            lora_linear(*tensors().values(), 1.0)


def test_set_backend_restores_the_previous_backend():
    with lf.set_backend("triton"):
        with lf.set_backend("torch"):
            pass
        with pytest.raises(lf.BackendError):
            lora_linear(*tensors(torch.float64).values(), 1.0)
    if DEVICE.type == "cpu":
        assert lora_linear(*tensors(torch.float64).values(), 1.0).dtype == torch.float64
