"""Tests of DoRA's op in what autograd may ask of it: any frozen tensors, second derivatives, hooks, modes, changes in
place. The values of its results are compared with plain torch ops."""

import itertools

import pytest
import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

import lora_fast as lf
from lora_fast.functional.dora import scaled_linear, weight_norms

NAMES, SCALING = ("x", "lora_A", "lora_B", "magnitude"), 0.5
# Every backend here has float32; the twin's float64 shows smaller errors.
BACKENDS = pytest.mark.parametrize("backend", ["torch", "triton"])
NEEDS = [needs for needs in itertools.product((False, True), repeat=4) if any(needs)]
SHAPES = (), (3,), (2, 3), (0,)


@pytest.fixture(autouse=True)
def on_cpu():
    if torch.cuda.is_available():
        pytest.skip("tests/dora/test_dora_linear.py runs the op on a CUDA machine")


def tensors(dtype=torch.float32, shape=(3,), d_in=6, d_out=5, r=2, needs=(True,) * 4) -> dict:
    generator = torch.Generator().manual_seed(0)
    make = lambda *sizes: torch.randn(*sizes, generator=generator, dtype=torch.float64, device="cpu").to(dtype)
    result = {"x": make(*shape, d_in), "weight": make(d_out, d_in), "bias": make(d_out)}
    result |= {"lora_A": make(r, d_in), "lora_B": make(d_out, r), "magnitude": make(d_out) + 3}
    norms = weight_norms(result["weight"], result["lora_A"], result["lora_B"], SCALING)
    for name, needed in zip(NAMES, needs, strict=True):
        result[name].requires_grad_(needed)
    return result | {"norms": norms, "scaling": SCALING}


def trained(arguments: dict) -> list[torch.Tensor]:
    return [arguments[name] for name in NAMES if arguments[name].requires_grad]


def plain(x, weight, bias, lora_A, lora_B, magnitude, norms, scaling):
    return magnitude / norms * (x @ weight.mT + scaling * (x @ lora_A.mT @ lora_B.mT)) + bias


def assert_close(got, expected, dtype) -> None:
    tolerance = 1e-10 if dtype is torch.float64 else 1e-4
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def dtype_of(backend: str) -> torch.dtype:
    return torch.float64 if backend == "torch" else torch.float32


@BACKENDS
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_any_gradients_are_those_of_plain_ops(backend, shape):
    """They are the same when the graph is used again."""
    for i, needs in enumerate(NEEDS):
        arguments = tensors(dtype_of(backend), shape, needs=needs)
        arguments["bias"].requires_grad_(i % 2 == 0)
        wanted = trained(arguments) + [arguments["bias"]] * (i % 2 == 0)
        dy = torch.ones_like(arguments["norms"]).cumsum(0).expand(*shape, 5)
        with lf.set_backend(backend):
            y = scaled_linear(**arguments)
            got, again = (torch.autograd.grad(y, wanted, dy, retain_graph=True) for _ in range(2))
        expected = plain(**arguments)
        assert_close([y, *got], [expected, *torch.autograd.grad(expected, wanted, dy)], dtype_of(backend))
        assert all(map(torch.equal, got, again))


@BACKENDS
@pytest.mark.parametrize("needs", NEEDS, ids=str)
def test_second_derivatives_are_right_or_refused(backend, needs):
    """Where lora_A is frozen x is not kept, from which gradients that depend on x would be computed again."""
    need_x, need_a, need_b, need_m = needs
    dtype, arguments = dtype_of(backend), tensors(dtype_of(backend), needs=needs)

    def second(run):
        dy = torch.linspace(-1, 1, 15, dtype=dtype, device="cpu").view(3, 5).requires_grad_()
        first = torch.autograd.grad(run(**arguments), trained(arguments), dy, create_graph=True)
        total = sum(gradient.sin().sum() for gradient in first)
        return torch.autograd.grad(total, [dy, *trained(arguments)], allow_unused=True, materialize_grads=True)

    with lf.set_backend(backend):
        if need_x and not need_a and (need_b or need_m):
            with pytest.raises(RuntimeError, match="frozen lora_A"):
                second(scaled_linear)
        else:
            assert_close(second(scaled_linear), second(plain), dtype)


def test_gradients_pass_gradcheck_in_batches_and_twice():
    arguments = tensors(torch.float64, (2,))
    rest = {name: arguments[name] for name in ("weight", "bias", "norms", "scaling")}
    run = lambda *values: scaled_linear(**dict(zip(NAMES, values, strict=True)), **rest)
    with lf.set_backend("torch"):
        assert torch.autograd.gradcheck(run, trained(arguments), check_batched_grad=True)
        assert torch.autograd.gradgradcheck(run, trained(arguments))


@BACKENDS
@pytest.mark.parametrize("needs", [(True,) * 4, (True, False, True, True), (False, False, False, True)], ids=str)
def test_backward_keeps_x_only_for_lora_A(backend, needs):
    """What is not kept may be changed in place, and so may y."""
    saved, arguments = [], tensors(needs=needs)
    pack = lambda tensor: (saved.append(tensor.shape), tensor)[1]
    expected = torch.autograd.grad(plain(**arguments), trained(arguments), torch.full((3, 5), 2.0, device="cpu"))
    with lf.set_backend(backend), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = scaled_linear(**arguments)
    assert (arguments["x"].shape in saved) is needs[1]
    with torch.no_grad():
        arguments["bias"].add_(1)
        if not needs[1]:
            arguments["x"].add_(1)
    y.mul_(2)
    assert_close(torch.autograd.grad(y.sum(), trained(arguments)), expected, torch.float32)


LAYOUTS = {
    "x transposed": {"x": lambda x: x.mT.contiguous().mT},
    "x and bias padded": {
        "x": lambda x: torch.cat([x, x], 1)[:, :6],
        "bias": lambda bias: bias.repeat(2).view(2, 5)[1],
    },
    "factors transposed": dict.fromkeys(("lora_A", "lora_B"), lambda factor: factor.mT.contiguous().mT),
    "weight transposed": {"weight": lambda weight: weight.mT.contiguous().mT},
    "vectors strided": dict.fromkeys(("magnitude", "norms", "bias"), lambda v: torch.stack([v, v], 1)[:, 0]),
}
DYS = {
    "dense": lambda dy: dy,
    "transposed": lambda dy: dy.mT.contiguous().mT,
    "padded": lambda dy: torch.cat([dy, dy], 1)[:, :5],
    "of one row": lambda dy: dy[:1].expand(3, 5),
    "of one number": lambda dy: dy[0, 0].expand(3, 5),
}


@BACKENDS
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(backend, layout):
    arguments = tensors(torch.float32)
    for name, change in LAYOUTS[layout].items():
        changed = change(arguments[name].detach())
        assert torch.equal(changed, arguments[name].detach())
        arguments[name] = changed.requires_grad_(arguments[name].requires_grad)
    for change in DYS.values():
        dy = change(torch.linspace(-1, 1, 15, dtype=torch.float32, device="cpu").view(3, 5))
        with lf.set_backend(backend):
            got = torch.autograd.grad(scaled_linear(**arguments), trained(arguments), dy)
        assert_close(got, torch.autograd.grad(plain(**arguments), trained(arguments), dy), torch.float32)


@BACKENDS
def test_modes_see_the_products_and_no_more(backend):
    """Backward does not compute x Wᵀ again, also where forward ran without the mode."""
    arguments = tensors(shape=(8,), d_in=16, d_out=32)
    base, thin = 2 * 8 * 16 * 32, 2 * 8 * (16 + 32) * 2
    with lf.set_backend(backend):
        with FlopCounterMode(display=False) as both:
            torch.autograd.grad(scaled_linear(**arguments).sum(), trained(arguments))
        y = scaled_linear(**arguments).sum()
        with FlopCounterMode(display=False) as backward:
            got = torch.autograd.grad(y, trained(arguments))
    assert both.get_total_flops() == 2 * base + 3 * thin
    assert 0 <= backward.get_total_flops() - (base + 2 * thin) <= thin  # kernels keep x Wᵀ, to which u adds a part
    assert_close(got, torch.autograd.grad(plain(**arguments).sum(), trained(arguments)), torch.float32)


@BACKENDS
def test_checkpointed_regions_compute_the_same(backend):
    arguments, seen = tensors(), []

    def policy(context, operator, *args, **kwargs):
        seen.append(str(operator))
        is_product = "mm" in str(operator) or "lora_linear" in str(operator)
        return CheckpointPolicy.MUST_SAVE if is_product else CheckpointPolicy.PREFER_RECOMPUTE

    def region(x):
        norms = weight_norms(arguments["weight"], arguments["lora_A"], arguments["lora_B"], SCALING)
        return scaled_linear(**{**arguments, "x": x, "norms": norms}).sin()

    expected = torch.autograd.grad(plain(**arguments).sin().sum(), trained(arguments))
    selective = {"context_fn": lambda: create_selective_checkpoint_contexts(policy)}
    with lf.set_backend(backend):
        for options in ({}, selective):
            y = checkpoint(region, arguments["x"], use_reentrant=False, **options).sum()
            assert_close(torch.autograd.grad(y, trained(arguments)), expected, torch.float32)
    assert any("lora_linear" in name if backend == "triton" else "mm" in name for name in seen)


@BACKENDS
@pytest.mark.parametrize("inside", [False, True])
def test_autocast_of_float32_layers(backend, inside):
    arguments = tensors(shape=(8,), d_in=16, d_out=12)
    expected = torch.autograd.grad(plain(**arguments).sum(), trained(arguments))
    with lf.set_backend(backend), torch.autocast("cpu", torch.bfloat16):
        y = scaled_linear(**arguments)
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            got = torch.autograd.grad(y, trained(arguments), torch.ones_like(y))
    assert y.dtype is torch.bfloat16 and {gradient.dtype for gradient in got} == {torch.float32}
    for ours, exact in zip(got, expected, strict=True):
        assert (ours - exact).norm() < 0.01 * exact.norm()


def test_transforms_of_functions():
    arguments = {name: v.detach() if isinstance(v, torch.Tensor) else v for name, v in tensors().items()}
    rest = {name: arguments[name] for name in ("weight", "bias", "norms", "scaling")}
    of = lambda run: lambda *values: run(**dict(zip(NAMES, values, strict=True)), **rest)
    values = [arguments[name] for name in NAMES]
    expected = torch.func.jacrev(of(plain), (0, 1, 2, 3))(*values)
    for transform in (torch.func.jacrev, torch.func.jacfwd):
        assert_close(transform(of(scaled_linear), (0, 1, 2, 3))(*values), expected, torch.float32)


@BACKENDS
def test_compiled_autograd_of_an_eager_forward(backend):
    arguments = tensors()
    expected = torch.autograd.grad(plain(**arguments).sin().sum(), trained(arguments))
    with lf.set_backend(backend):
        y = scaled_linear(**arguments).sin().sum()
        with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager")):
            y.backward()
    assert_close([tensor.grad for tensor in trained(arguments)], expected, torch.float32)


def test_norms_of_a_call_under_inference_mode_serve_training():
    layer = lf.DoRALinear(6, 5, r=2, alpha=4, dtype=torch.float32, device="cpu").eval()
    torch.nn.init.normal_(layer.lora_B)
    x = torch.ones(3, 6, dtype=torch.float32, device="cpu")
    with torch.inference_mode():
        expected = layer(x)
    y = layer(x)
    y.sum().backward()
    assert torch.equal(y, expected) and layer.lora_magnitude_vector.grad.count_nonzero() == 5
