"""functional.lora_linear_batched on both backends: against float64 with the error budget of PEFT's formula, its
gradients, forms of its arguments, and its errors."""

import pytest
import torch
from budget import check, eager_lora_linear, error
from launching import DEVICE, randn
from torch.fx.experimental.proxy_tensor import make_fx

import lora_fast as lf
from lora_fast.functional import lora_linear_batched
from lora_fast.ops.batched import sort_rows

pytestmark = pytest.mark.gpu

BFLOAT16, FLOAT16, FLOAT32, FLOAT64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
RANKS, SCALING = (4, 16, 3), [0.5, -1.0, 2.0]
BACKENDS = ["torch", "triton"]


def tensors(shape=(5, 7), dtype=FLOAT32, adapter=None, d_in=24, d_out=40) -> dict:
    """Returns arguments, with an adapter for each of x's first dimension."""
    make = lambda *sizes, kind=dtype, seed=0: randn(*sizes, seed=seed, dtype=kind)
    return {
        "x": make(*shape, d_in),
        "weight": make(d_out, d_in),
        "bias": make(d_out),
        "lora_A": [make(r, d_in, kind=adapter or dtype, seed=i) for i, r in enumerate(RANKS)],
        "lora_B": [make(d_out, r, kind=adapter or dtype, seed=i) for i, r in enumerate(RANKS)],
        "scaling": SCALING,
        "adapter_indices": torch.tensor([2, -1, 0, 2, 1], device=DEVICE)[: shape[0]],
    }


def exact(formula, x, weight, bias, lora_A, lora_B, scaling, adapter_indices) -> torch.Tensor:
    """Returns y of a loop over samples."""
    samples = []
    for row, adapter in zip(x, adapter_indices.tolist(), strict=True):
        plain = torch.nn.functional.linear(row, weight, bias)
        own = adapter >= 0
        samples.append(formula(row, weight, bias, lora_A[adapter], lora_B[adapter], scaling[adapter]) if own else plain)
    return torch.stack(samples)


def in_float64(t: dict) -> dict:
    wide = lambda value: value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
    return {name: [wide(entry) for entry in value] if type(value) is list else wide(value) for name, value in t.items()}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "dtype, adapter", [(FLOAT32, FLOAT32), (BFLOAT16, BFLOAT16), (BFLOAT16, FLOAT32), (FLOAT16, FLOAT32)], ids=str
)
def test_result_is_within_the_budget_of_pefts_formula(backend, dtype, adapter):
    t = tensors(dtype=dtype, adapter=adapter)
    with lf.set_backend(backend):
        y = lora_linear_batched(**t)
    wanted = exact(eager_lora_linear, **in_float64(t))
    assert y.dtype is dtype
    check("y", y, wanted, error(exact(eager_lora_linear, **t), wanted), dtype)


@pytest.mark.parametrize("backend", BACKENDS)
def test_indices_of_samples_and_of_rows_give_the_same_bits(backend):
    t = tensors()
    with lf.set_backend(backend):
        y = lora_linear_batched(**t)
        of_rows = t["adapter_indices"].int()[:, None].expand(5, 7)
        assert torch.equal(lora_linear_batched(**t | {"adapter_indices": of_rows}), y)
        one = t | {"x": t["x"][3, 2], "adapter_indices": t["adapter_indices"][3]}
        torch.testing.assert_close(lora_linear_batched(**one), y[3, 2])
        none = t | {"x": t["x"][:0], "adapter_indices": t["adapter_indices"][:0]}
        assert lora_linear_batched(**none).shape == (0, 7, 40)
        base = t | {"adapter_indices": torch.full_like(t["adapter_indices"], -1)}
        plain = torch.nn.functional.linear(t["x"].view(35, -1), t["weight"], t["bias"]).view(y.shape)
        assert torch.equal(lora_linear_batched(**base), plain)


@pytest.mark.parametrize("backend", BACKENDS)
def test_views_are_taken_as_they_are(backend):
    t = tensors()
    with lf.set_backend(backend):
        y = lora_linear_batched(**t)
        views = {
            "x": t["x"].repeat_interleave(2, -1)[..., ::2],
            "weight": t["weight"].t().contiguous().t(),
            "lora_A": [a.t().contiguous().t() for a in t["lora_A"]],
            "lora_B": [b.t().contiguous().t() for b in t["lora_B"]],
        }
        torch.testing.assert_close(lora_linear_batched(**t | views), y)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_are_those_of_the_loop(backend):
    t = tensors(dtype=FLOAT32)
    leaves = [t["x"], t["bias"], *t["lora_A"], *t["lora_B"]]
    [leaf.requires_grad_() for leaf in leaves]
    with lf.set_backend(backend):
        y = lora_linear_batched(**t)
        with torch.no_grad():
            torch.testing.assert_close(lora_linear_batched(**t), y)
    wanted = exact(eager_lora_linear, **t)
    torch.testing.assert_close(y, wanted)
    for got, grad in zip(*(torch.autograd.grad(result.square().sum(), leaves) for result in (y, wanted)), strict=True):
        torch.testing.assert_close(got, grad, rtol=1e-4, atol=1e-3)


def test_gradient_of_an_adapter_has_no_nan_of_other_rows():
    t = tensors()
    t["x"][1], t["x"][2] = torch.nan, torch.nan  # of no adapter, and of adapter 0
    [factor.requires_grad_() for factor in (*t["lora_A"], *t["lora_B"])]
    grads = torch.autograd.grad(lora_linear_batched(**t)[[0, 2, 3, 4]].sum(), [*t["lora_A"], *t["lora_B"]])
    assert [bool(grad.isnan().any()) for grad in grads] == [True, False, False] * 2


def test_autocast_casts_what_it_casts_of_linear():
    t = tensors()
    with torch.autocast(DEVICE.type, dtype=BFLOAT16):
        y = lora_linear_batched(**t)
    cast = {name: t[name].to(BFLOAT16) for name in ("x", "weight", "bias")}
    assert y.dtype is BFLOAT16 and torch.equal(y, lora_linear_batched(**t | cast))


def test_host_does_not_read_the_device():
    """The meta device has no values to read."""
    rows, ends = sort_rows(torch.tensor([1, -1, 0], device="meta"), 2, 4)
    assert (rows.shape, ends.shape) == ((12,), (2,)) and rows.dtype is ends.dtype is torch.int32


def test_compiled_call_is_one_graph():
    t = tensors()
    compiled = torch.compile(lora_linear_batched, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(**t), lora_linear_batched(**t))


@pytest.mark.parametrize("mode", ["real", "symbolic"])
def test_transforms_and_traces_take_plain_ops(mode):
    t = tensors()
    x, indices = t["x"], t["adapter_indices"][:, None].repeat(1, 7)
    fixed = t["weight"], t["bias"], *t["lora_A"], *t["lora_B"]

    def call(x, indices, weight, bias, *factors):
        return lora_linear_batched(x, weight, bias, factors[:3], factors[3:], SCALING, indices)

    traced = make_fx(call, tracing_mode=mode)(x, indices, *fixed)
    torch.testing.assert_close(traced(x.neg(), indices, *fixed), call(x.neg(), indices, *fixed))
    each = torch.func.vmap(call, in_dims=(0, 0, *[None] * len(fixed)))
    torch.testing.assert_close(each(x, indices, *fixed), call(x, indices, *fixed))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 24), (5, 0), (0, 0)])
def test_empty_sizes(backend, shape):
    n_tokens, d_in = shape
    t = tensors((n_tokens,), d_in=d_in) | {"bias": None}
    with lf.set_backend(backend), torch.no_grad():
        y = lora_linear_batched(**t)
    assert y.shape == (n_tokens, 40) and not y.any()


def test_meta_and_float64():
    t = tensors(dtype=FLOAT64)
    with lf.set_backend("torch"):
        torch.testing.assert_close(lora_linear_batched(**t), exact(eager_lora_linear, **t), rtol=1e-12, atol=1e-12)
    to_meta = lambda value: value.to("meta") if isinstance(value, torch.Tensor) else value
    meta = {n: [to_meta(entry) for entry in v] if type(v) is list else to_meta(v) for n, v in t.items()}
    assert lora_linear_batched(**meta).shape == (5, 7, 40)


WRONG = {
    "x": lambda t: {"x": t["x"][..., 1:]},
    "weight": lambda t: {"weight": t["weight"].clone().requires_grad_()},
    "bias": lambda t: {"bias": t["bias"].double()},
    "lora_A": lambda t: {"lora_A": [], "lora_B": [], "scaling": []},
    "lora_A[1]": lambda t: {"lora_A": [t["lora_A"][0], t["lora_A"][1][:, 1:], t["lora_A"][2]]},
    "lora_B": lambda t: {"lora_B": t["lora_B"][:2]},
    "lora_B[0]": lambda t: {"lora_B": [t["lora_B"][1], *t["lora_B"][1:]]},
    "lora_B[2]": lambda t: {"lora_B": [*t["lora_B"][:2], t["lora_B"][2].half()]},
    "scaling": lambda t: {"scaling": 0.5},
    "scaling[1]": lambda t: {"scaling": [0.5, float("nan"), 2.0]},
}
WRONG_INDICES = {
    "dtype": lambda i: i.float(),
    "shape": lambda i: i[:4],
    "too large": lambda i: i + 1,
    "too small": lambda i: i - 1,
    "device": lambda i: i.to("meta"),
}


@pytest.mark.parametrize("argument", WRONG)
def test_wrong_arguments_are_named(argument):
    t = tensors()
    with pytest.raises(lf.ArgumentError) as raised:
        lora_linear_batched(**t | WRONG[argument](t))
    assert raised.value.argument == argument


@pytest.mark.parametrize("kind", WRONG_INDICES)
def test_wrong_indices_are_named(kind):
    if DEVICE.type == "cuda" and kind.startswith("too"):
        pytest.skip("the host does not read the numbers on a GPU")
    t = tensors()
    with pytest.raises(lf.ArgumentError, match="adapter_indices: expected"):
        lora_linear_batched(**t | {"adapter_indices": WRONG_INDICES[kind](t["adapter_indices"])})
