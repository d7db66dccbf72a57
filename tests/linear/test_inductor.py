"""Compiled layers on the torch ops, as Inductor gets them: the registered ops replaced by plain ones."""

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._guards import detect_fake_mode

import lora_fast as lf
from lora_fast.ops.reference import linear as reference
from lora_fast.ops.reference.hashed_mask import hashed_mask

D_IN, D_OUT, RANK, TOKENS = 10, 12, 4, 6


class Inductor:
    """A backend of torch.compile that does what Inductor does, up to our replacement, and runs the graphs as they are.
    It keeps the graphs of forward and of backward."""

    def __init__(self):
        self.graphs = []
        self.backend = aot_autograd(
            fw_compiler=self._compile, bw_compiler=self._compile, partition_fn=min_cut_rematerialization_partition
        )

    def _compile(self, module, inputs):
        from torch._inductor.fx_passes import post_grad
        from torch._inductor.virtualized import V

        with V.set_fake_mode(detect_fake_mode(inputs)):
            post_grad.pass_patterns[0].apply(module.graph)
        module.graph.lint()
        module.recompile()
        self.graphs.append(module.graph)
        return make_boxed_func(module)

    def ops(self):
        return sum("lora_fast" in str(node.target) for graph in self.graphs for node in graph.nodes)


def layer_of(dtype=torch.float64, **options):
    torch.manual_seed(0)
    layer = lf.LoRALinear(D_IN, D_OUT, r=RANK, alpha=6, device="cpu", dtype=dtype, **options)
    nn.init.normal_(layer.lora_B)
    return layer


def inputs(*shape, dtype=torch.float64):
    return torch.linspace(-1, 2, D_IN * TOKENS, dtype=dtype, device="cpu").sin().view(*shape, D_IN).requires_grad_()


def gradients(layer, run, x):
    x.grad = None
    layer.zero_grad()
    y = run(x)
    y.square().sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in layer.parameters() if p.requires_grad)]


@pytest.fixture(autouse=True)
def torch_backend():
    torch._dynamo.reset()
    with lf.set_backend("torch"):
        yield


@pytest.mark.parametrize("frozen", [None, "lora_A", "lora_B", "x"])
@pytest.mark.parametrize("bias, shape", [(True, (2, 3)), (False, (TOKENS,))])
def test_graphs_of_plain_ops_have_the_ops_gradients(bias, shape, frozen):
    layer, inductor = layer_of(bias=bias), Inductor()
    x = inputs(*shape)
    if frozen == "x":
        x.requires_grad_(False)
    elif frozen:
        getattr(layer, frozen).requires_grad_(False)
    compiled = torch.compile(layer, backend=inductor.backend, fullgraph=True)
    got, expected = gradients(layer, compiled, x), gradients(layer, layer, x)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    assert all(grad.stride() == other.stride() for grad, other in zip(got[2:], expected[2:], strict=True))
    assert len(inductor.graphs) == 2 and inductor.ops() == 0


@pytest.mark.parametrize("shape", [(2, 3), (TOKENS,)])
def test_dropout_is_that_of_the_saved_keys(shape):
    """The expectation is PEFT's formula by autograd, with the mask of the keys that forward hands to backward. Nothing
    else is saved but the arguments and S."""
    layer, inductor = layer_of(dropout=0.3, bias=False), Inductor()
    x = inputs(*shape)
    saved, compiled = [], torch.compile(layer, backend=inductor.backend, fullgraph=True)

    def run(x):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            return compiled(x)

    got = gradients(layer, run, x)
    given = {p.data_ptr() for p in (x, *layer.parameters())}
    keys, s = sorted((t for t in saved if t.data_ptr() not in given), key=torch.numel)
    assert (keys.shape, keys.dtype, s.shape) == ((2,), torch.int32, (TOKENS, RANK)) and inductor.ops() == 0
    keep = reference.draw_mask(x, 0.3, keys).view(x.shape).double() * reference.keep_scale(0.3)
    formula = lambda x: x @ layer.weight.T + 1.5 * (x * keep) @ layer.lora_A.T @ layer.lora_B.T
    torch.testing.assert_close(got, gradients(layer, formula, x), rtol=1e-12, atol=1e-12)


def test_a_forward_and_a_backward_that_keeps_the_op_have_one_mask(monkeypatch):
    """As where another backend than Inductor compiles one of them."""
    layer, x, plain, op = layer_of(dropout=0.3), inputs(2, 3), Inductor(), Inductor()
    results = []
    for inductor in (plain, op):
        torch._dynamo.reset()
        torch.manual_seed(3)
        results.append(gradients(layer, torch.compile(layer, backend=inductor.backend, fullgraph=True), x))
        monkeypatch.setattr("lora_fast.ops.inductor._is_plain", lambda *arguments: False)
    assert (plain.ops(), op.ops()) == (0, 2)
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


def test_calls_of_a_compiled_layer_draw_masks_that_the_generator_reproduces():
    layer, x, inductor = layer_of(dropout=0.5), inputs(2, 3), Inductor()
    compiled = torch.compile(layer, backend=inductor.backend, fullgraph=True)
    runs = []
    for _ in range(2):
        torch.manual_seed(7)
        runs.append([compiled(x), compiled(x)])
    assert torch.equal(runs[0][0], runs[1][0]) and torch.equal(runs[0][1], runs[1][1])
    assert not torch.equal(*runs[0])


@pytest.mark.parametrize("case", ["16 bits", "float32 adapter", "seed", "autocast"])
def test_other_calls_keep_the_op(case):
    weight = torch.bfloat16 if case in ("16 bits", "float32 adapter") else torch.float32
    adapter = torch.bfloat16 if case == "16 bits" else torch.float32
    x, a, b = torch.randn(TOKENS, D_IN, dtype=weight), torch.randn(RANK, D_IN), torch.randn(D_OUT, RANK)
    a, b = a.to(adapter).requires_grad_(), b.to(adapter).requires_grad_()
    frozen, inductor = torch.randn(D_OUT, D_IN, dtype=weight), Inductor()
    dropout = (0.3, 5) if case == "seed" else ()
    call = lambda x: lf.functional.lora_linear(x, frozen, None, a, b, 2.0, *dropout)
    with torch.autocast("cpu", torch.bfloat16, enabled=case == "autocast"):
        y, expected = torch.compile(call, backend=inductor.backend, fullgraph=True)(x), call(x)
    y.float().sum().backward()
    assert torch.equal(y, expected)  # with a seed, too: it fixes the result
    assert inductor.ops() == 2


def test_dynamic_shapes_are_compiled_once():
    layer, inductor = layer_of(dropout=0.3), Inductor()
    compiled = torch.compile(layer, backend=inductor.backend, fullgraph=True, dynamic=True)
    for tokens in (3, 4, 7):
        x = torch.ones(2, tokens, D_IN, dtype=torch.float64, device="cpu", requires_grad=True)
        assert gradients(layer, compiled, x)[1].shape == x.shape
    assert len(inductor.graphs) == 2 and inductor.ops() == 0


def test_scalings_that_change_are_read():
    inductor, weight, x = Inductor(), torch.randn(D_OUT, D_IN), torch.randn(TOKENS, D_IN)
    a, b = torch.randn(RANK, D_IN, requires_grad=True), torch.randn(D_OUT, RANK, requires_grad=True)
    call = lambda x, scaling: lf.functional.lora_linear(x, weight, None, a, b, scaling)
    compiled = torch.compile(call, backend=inductor.backend, fullgraph=True)
    for scaling in (1.5, 2.5, 3.5, 4, torch.tensor(5.5)):
        torch.testing.assert_close(compiled(x, scaling), call(x, scaling))
        (gradient,) = torch.autograd.grad(compiled(x, scaling).sum(), a)
        torch.testing.assert_close(gradient, torch.autograd.grad(call(x, scaling).sum(), a)[0])


# ── the mask ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def masks(level, count=2, n_tokens=256, d_in=576):
    generator = torch.Generator().manual_seed(1)
    keys = torch.randint(-(1 << 31), (1 << 31) - 1, (count, 2), dtype=torch.int32, generator=generator)
    return [hashed_mask(key, n_tokens, d_in, level) for key in keys]


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_hashed_mask_drops_independently(p):
    """Frequencies of pairs of neighbours, in rows, columns and between keys, are those of independent elements: five
    standard deviations."""
    level = reference.drop_level(p)
    first, second = ((mask.double() - (1 - p)) / (p * (1 - p)) ** 0.5 for mask in masks(level))
    n = first.numel()
    products = [first, first[1:] * first[:-1], first[:, 1:] * first[:, :-1], first[:, 8:] * first[:, :-8]]
    products += [first * second, first[:, 1:] * second[:, :-1], first[1:] * second[:-1]]
    products += [first.sum(0, keepdim=True).square() / len(first) - 1, first.sum(1).square() / first.shape[1] - 1]
    for product in products[:7]:
        assert abs(product.sum()) <= 5 * n**0.5
    for squares in products[7:]:  # chi-squared: sums of rows and columns vary as much as they should
        assert abs(squares.mean()) <= 5 * (2 / squares.numel()) ** 0.5


def test_hashed_mask_keeps_all_or_nothing_at_the_ends():
    assert all(mask.float().mean() >= 1 - 1e-5 for mask in masks(0))
    assert not any(mask.any() for mask in masks(reference.DROP_LEVELS))


def test_hashed_mask_is_lowbias32s():
    """Against integers of Python, with Wellons' last shift, which changes none of the bits that are compared."""
    low, keys, level = (1 << 32) - 1, [123456789, -987654321], 20000
    got = hashed_mask(torch.tensor(keys, dtype=torch.int32), 3, 5, level).flatten().tolist()
    for number, kept in enumerate(got):
        x = (number + keys[0]) & low
        x = ((x ^ x >> 16) * 0x7FEB352D) & low
        x = ((x ^ x >> 15 ^ (keys[1] & low)) * 0x846CA68B) & low
        signed = x - (1 << 32) if x >> 31 else x
        assert kept == (signed >= (level << 16) - (1 << 31))
