"""Tests of functional.lora_grouped_linear against the dense formula in float64."""

import pytest
import torch
from budget import check, error
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import lora_fast as lf
from lora_fast.functional import lora_grouped_linear
from lora_fast.functional.experts import grouped_linear

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROUTINGS = {"skewed": (1, 9, 0, 4, 0), "one expert": (0, 0, 13, 0, 0), "none": (0, 0, 0, 0, 0), "rest": (3, 0, 2, 0, 4)}


def tensors(counts, dtype=torch.float32, adapter=None, rest=0, d_in=24, d_out=40, r=4, transposed=False) -> dict:
    generator = torch.Generator().manual_seed(0)
    make = lambda *shape, kind=dtype: torch.randn(*shape, generator=generator).to(DEVICE, kind)
    n_experts = len(counts)
    weight = make(n_experts, d_in, d_out).mT if transposed else make(n_experts, d_out, d_in)
    lora_B = make(d_out, r, n_experts, kind=adapter or dtype).permute(2, 0, 1)  # PEFT's layout
    return {
        "x": make(sum(counts) + rest, d_in).requires_grad_(),
        "weight": weight,
        "bias": make(n_experts, d_out),
        "lora_A": make(n_experts, r, d_in, kind=adapter or dtype).requires_grad_(),
        "lora_B": lora_B.requires_grad_(),
        "scaling": 0.5,
        "offsets": torch.tensor(counts, device=DEVICE).cumsum(0).int(),
    }


def dense(x, weight, bias, lora_A, lora_B, scaling, offsets):
    """Returns y by a loop over the experts, as PEFT computes it: W + ΔW in the weight's dtype."""
    starts, parts = [0, *offsets.tolist()], []
    for e in range(len(weight)):
        w = weight[e] + scaling * (lora_B[e].to(weight.dtype) @ lora_A[e].to(weight.dtype))
        parts.append(x[starts[e] : starts[e + 1]] @ w.mT + bias[e])
    return torch.cat([*parts, x.new_zeros(len(x) - starts[-1], weight.shape[1])])


def results(run, arguments: dict) -> list[torch.Tensor]:
    trained = [arguments[name] for name in ("x", "lora_A", "lora_B")]
    y = run(**arguments)
    dy = torch.linspace(-1, 1, y.numel(), dtype=torch.float64, device=DEVICE).cos().view(y.shape).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, trained, dy)]


def in_float64(arguments: dict) -> dict:
    wide = {name: v.detach().double() if isinstance(v, torch.Tensor) else v for name, v in arguments.items()}
    trained = {name: wide[name].requires_grad_() for name in ("x", "lora_A", "lora_B")}
    return wide | trained | {"offsets": arguments["offsets"]}


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("d_in, r", [(24, 4), (23, 3)], ids=["aligned", "odd"])
@pytest.mark.parametrize("transposed", [False, True], ids=["(E, out, in)", "(E, in, out)"])
def test_results_are_those_of_the_dense_formula(routing, d_in, r, transposed):
    arguments = tensors(ROUTINGS[routing], rest=2 * (routing == "rest"), d_in=d_in, r=r, transposed=transposed)
    for got, want in zip(results(lora_grouped_linear, arguments), results(dense, in_float64(arguments)), strict=True):
        assert got.shape == want.shape
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype, adapter", [("bfloat16", None), ("bfloat16", "float32"), ("float16", None)])
def test_errors_in_16_bits_are_at_most_pefts(dtype, adapter):
    dtype, adapter = getattr(torch, dtype), adapter and getattr(torch, adapter)
    arguments = tensors((5, 0, 40, 3), dtype, adapter, d_in=64, r=8)
    exact = results(dense, in_float64(arguments))
    got, peft = results(lora_grouped_linear, arguments), results(dense, arguments)
    for name, ours, theirs, want in zip(("y", "dx", "da", "db"), got, peft, exact, strict=True):
        check(name, ours, want, error(theirs, want), dtype)


def test_float64_and_second_derivatives():
    arguments = in_float64(tensors((2, 0, 3), d_in=5, d_out=3, r=2))
    trained = [arguments[name] for name in ("x", "lora_A", "lora_B")]
    weight, offsets = arguments["weight"], arguments["offsets"]
    run = lambda x, a, b: lora_grouped_linear(x, weight, None, a, b, 0.5, offsets)
    with lf.set_backend("torch"):
        for got, want in zip(results(lora_grouped_linear, arguments), results(dense, arguments), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
        assert torch.autograd.gradcheck(run, trained)
        assert torch.autograd.gradgradcheck(run, trained)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("d_in, d_out", [(24, 7), (7, 24), (24, 40)])
def test_gradients_of_layers_without_an_adapter(d_in, d_out, dtype):
    """Torch's own derivative of its grouped product refuses some sizes, and a gradient that is expanded."""
    arguments = tensors((1, 9, 0, 4, 0), dtype, d_in=d_in, d_out=d_out, rest=2)
    x, weight, bias, offsets = (arguments[name] for name in ("x", "weight", "bias", "offsets"))
    grouped_linear(x, weight, bias, offsets).sum().backward()
    counts = torch.diff(offsets, prepend=offsets.new_zeros(1), append=offsets.new_full((1,), len(x)))
    want = torch.cat((weight.double().sum(1), weight.new_zeros((1, d_in)).double())).repeat_interleave(counts, 0)
    torch.testing.assert_close(x.grad.double(), want, rtol=1e-2, atol=1e-2 if dtype is torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("d_in, d_out", [(24, 40), (24, 7)])
def test_second_derivatives_in_float32(d_in, d_out):
    arguments = tensors((1, 9, 0, 4), d_in=d_in, d_out=d_out)

    def penalty(run, arguments):
        trained = [arguments[name] for name in ("x", "lora_A", "lora_B")]
        grads = torch.autograd.grad(run(**arguments).square().sum(), trained, create_graph=True)
        return torch.autograd.grad(sum(grad.sin().sum() for grad in grads), trained)

    with lf.set_backend("torch"):
        exact = penalty(dense, in_float64(arguments))
        ours, theirs = penalty(lora_grouped_linear, arguments), penalty(dense, arguments)
    for got, other, want in zip(ours, theirs, exact, strict=True):
        assert error(got, want) <= 4 * error(other, want) + 1e-6


def batched_gradients(run, x):
    x = x.clone().requires_grad_()
    y = run(x)
    return torch.autograd.grad(y, x, torch.stack([y.detach(), y.detach().sin()]), is_grads_batched=True)[0]


def tangent(run, x):
    with torch.autograd.forward_ad.dual_level():
        return torch.autograd.forward_ad.unpack_dual(run(torch.autograd.forward_ad.make_dual(x, x.cos()))).tangent


TRANSFORMS = {
    "grad": lambda run, x: torch.func.grad(lambda x: run(x).sin().sum())(x),
    "vmap": lambda run, x: torch.func.vmap(run)(torch.stack([x, x.sin()])),
    "jvp": lambda run, x: torch.func.jvp(run, (x,), (x.cos(),))[1],
    "hessian": lambda run, x: torch.func.hessian(lambda x: run(x).sin().sum())(x),
    "forward mode": tangent,
    "batched gradients": batched_gradients,
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms(transform):
    """In float32, of whose grouped product torch has no rules for transforms."""
    arguments = tensors((1, 3, 0, 2), d_in=8, d_out=12)
    x, exact = arguments.pop("x").detach(), in_float64(arguments | {"x": arguments["weight"]})
    del exact["x"]
    with lf.set_backend("torch"):
        got = TRANSFORMS[transform](lambda x: lora_grouped_linear(x, **arguments), x)
        want = TRANSFORMS[transform](lambda x: dense(x, **exact), x.double())
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)


class Calls(TorchDispatchMode):
    """Notes torch's calls and the most elements that one of them makes."""

    looks_inside = True

    def __init__(self):
        super().__init__()
        self.names, self.most = [], 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        self.names.append(str(operator))
        if isinstance(result, torch.Tensor) and not operator.is_view:
            self.most = max(self.most, result.numel())
        return result


def calls_of(n_experts: int) -> Calls:
    counts = [3] * 4 + [0] * (n_experts - 4)
    arguments = tensors(counts, d_in=64, d_out=48)
    with Calls() as calls:
        results(lora_grouped_linear, arguments)
    return calls


def test_calls_do_not_depend_on_the_number_of_experts_and_form_no_weight():
    few, many = calls_of(4), calls_of(64)
    assert few.names == many.names
    assert many.most < 64 * 64 * 48 / 4


def test_saved_are_x_and_s():
    arguments, saved = tensors((4, 0, 5, 0)), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        lora_grouped_linear(**arguments | {"bias": None})
    own = {arguments[name].data_ptr() for name in ("x", "weight", "lora_A", "lora_B", "offsets")}
    assert [tuple(tensor.shape) for tensor in saved if tensor.data_ptr() not in own] == [(9, 4)]


def test_a_product_without_an_adapter_keeps_no_rows():
    """A frozen weight needs them for no gradient."""
    arguments, saved = tensors((4, 0, 5, 0)), []
    x, weight, offsets = (arguments[name] for name in ("x", "weight", "offsets"))
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        y = grouped_linear(x, weight, None, offsets)
    assert {tensor.data_ptr() for tensor in saved} == {weight.data_ptr(), offsets.data_ptr()}
    (dx,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(dx, weight.sum(1).repeat_interleave(torch.tensor((4, 0, 5, 0), device=DEVICE), 0))


def test_checkpointing_and_autocast():
    arguments = tensors((4, 0, 5, 2))
    plain = results(lora_grouped_linear, arguments)
    again = results(lambda **named: checkpoint(lora_grouped_linear, **named, use_reentrant=False), arguments)
    assert all(map(torch.equal, plain, again))
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        y = lora_grouped_linear(**arguments)
    assert y.dtype is torch.bfloat16
    assert error(y.detach(), plain[0].double()) < 0.01


def test_a_compiled_call_has_the_op_alone():
    arguments = tensors((4, 0, 5, 2))
    compiled = torch.compile(lora_grouped_linear, backend="aot_eager", fullgraph=True)
    for got, want in zip(results(compiled, arguments), results(lora_grouped_linear, arguments), strict=True):
        torch.testing.assert_close(got, want)


WRONG = {
    "weight": (lambda a: a | {"weight": a["weight"][0]}, "weight: expected shape"),
    "no experts": (
        lambda a: a | {name: a[name][:0] for name in ("weight", "bias", "lora_A", "lora_B", "offsets")},
        "weight: expected shape .* at least one expert",
    ),
    "transposed weight": (lambda a: a | {"weight": a["weight"].mT}, "lora_A: expected shape"),
    "trained weight": (lambda a: a | {"weight": a["weight"].clone().requires_grad_()}, "weight: expected a frozen"),
    "rank of b": (lambda a: a | {"lora_B": a["lora_B"][..., :3]}, "lora_B: expected shape"),
    "experts of a": (lambda a: a | {"lora_A": a["lora_A"][:2]}, "lora_A: expected shape"),
    "x": (lambda a: a | {"x": a["x"][None]}, "x: expected shape"),
    "dtype of x": (lambda a: a | {"x": a["x"].half()}, "x: expected weight's dtype"),
    "bias": (lambda a: a | {"bias": a["bias"][0]}, "bias: expected shape"),
    "scaling": (lambda a: a | {"scaling": float("nan")}, "scaling: expected a finite number"),
    "dtype of offsets": (lambda a: a | {"offsets": a["offsets"].long()}, "offsets: expected dtype torch.int32"),
    "decreasing offsets": (lambda a: a | {"offsets": a["offsets"].flip(0)}, "offsets: expected the ends"),
    "offsets past the rows": (lambda a: a | {"offsets": a["offsets"] + 3}, "offsets: expected the ends"),
}


@pytest.mark.parametrize("case", WRONG)
def test_bad_input_is_named(case):
    change, message = WRONG[case]
    if "offsets" in case and case != "dtype of offsets" and DEVICE.type == "cuda":
        pytest.skip("values on a GPU are not read")
    with pytest.raises(lf.ArgumentError, match=message):
        lora_grouped_linear(**change(tensors((4, 0, 5, 2))))


def test_registered_ops_return_what_graphs_expect():
    arguments = tensors((5, 0, 3), d_in=24, d_out=40, r=3)
    x, weight, a, b, offsets = (arguments[name] for name in ("x", "weight", "lora_A", "lora_B", "offsets"))
    dy, s = torch.randn(8, 40, device=DEVICE), torch.randn(8, 3, device=DEVICE)
    ops, checks = torch.ops.lora_fast, ("test_schema", "test_faketensor")
    factors = x.detach(), a.detach(), b.detach()
    torch.library.opcheck(
        ops.grouped_linear.default, (factors[0], weight, *factors[1:], 0.5, offsets, False), test_utils=checks
    )
    for needs in ([True, True, True], [False, True, False]):
        call = (dy, factors[0], s, weight, *factors[1:], 0.5, offsets, False, needs)
        torch.library.opcheck(ops.grouped_linear_backward.default, call, test_utils=checks)
    torch.library.opcheck(ops.grouped_product.default, (factors[0], weight.mT, offsets), test_utils=checks)
    y = ops.grouped_product(x, weight.mT, offsets)
    want = lf.functional.experts.grouped_linear(x, weight, None, offsets)
    assert torch.equal(y, want)
    assert torch.equal(*(torch.autograd.grad(result, x, dy)[0] for result in (y, want)))
