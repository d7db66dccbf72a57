"""Layers over every quantised format that installs here: the library's product bit for bit, gradients by the
dequantised weight, and PEFT's results with PEFT's layers."""

import contextlib
import copy
import io
import pickle

import budget
import pytest
import torch
from quantized_layers import D_IN, D_OUT, FORMATS, RANK, peft_model, quantized
from torch import nn

import lora_fast as lf
from lora_fast.quantized import quantized_weight

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
KINDS = ["nf4-nested", "int8", "torchao-int8", "torchao-nf4", "hqq-4", "gptq-4"]  # one for each class of layers
CASES = {  # dtype of x and of the library's layer, of the adapter, of autocast
    "float32": (torch.float32, torch.float32, None),
    "bfloat16": (torch.bfloat16, torch.bfloat16, None),
    "bfloat16-float32-adapters": (torch.bfloat16, torch.float32, None),
    "float32-autocast": (torch.float32, torch.float32, torch.bfloat16),
}
COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": lambda model: _saved_whole(model),
}


def _saved_whole(model):
    file = io.BytesIO()
    torch.save(model, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


def injected(base, dropout=0.0):
    """Returns a Sequential of one LoRALinear over a quantised layer, with the adapter of ``peft_model``."""
    model = nn.Sequential(base)
    lf.inject_(model, lf.LoRAConfig(r=RANK, alpha=6, dropout=dropout))
    adapter = peft_model("torchao-int8", nn.Linear(D_IN, D_OUT))[0]
    with torch.no_grad():
        model[0].lora_A.copy_(adapter.lora_A["default"].weight)
        model[0].lora_B.copy_(adapter.lora_B["default"].weight)
    return model


def factors(layer):
    peft = isinstance(layer.lora_A, nn.ModuleDict)
    return [factor["default"].weight if peft else factor for factor in (layer.lora_A, layer.lora_B)]


def run(model, x, dy, autocast=None):
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", autocast) if autocast else contextlib.nullcontext():
        y = model(x)
    y.backward(dy.to(y.dtype))
    a, b = factors(model[0])
    return {"y": y.detach(), "dx": x.grad, "da": a.grad, "db": b.grad}


def draw(dtype=torch.float32):
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(2, 5, size, generator=generator).to(dtype) for size in (D_IN, D_OUT)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_product_is_the_librarys_and_gradients_are_by_the_dequantised_weight(name, dtype):
    base = quantized(name, dtype)
    weight, (x, dy) = quantized_weight(base), draw(dtype)
    x.requires_grad_()
    y = base(x)
    y.backward(dy)
    assert (weight.shape, weight.device, weight.dtype) == ((D_OUT, D_IN), x.device, None)
    model = nn.Sequential(base)
    lf.inject_(model, lf.LoRAConfig(r=RANK))  # b is zero
    assert torch.equal(model(x), y) and model(x).dtype is y.dtype
    exact = dy.double() @ weight.dequantized(torch.float64)
    budget.check("dx", weight.grad(dy), exact, budget.error(x.grad, exact), dtype)


@pytest.mark.parametrize("name", FORMATS)
def test_dequantised_weight_is_what_the_library_multiplies_by(name, monkeypatch):
    monkeypatch.setattr("lora_fast.quantized.torchao.STRIP", 96)
    base = quantized(name, bias=False)
    with torch.no_grad():
        rows = [base(row[None])[0] for row in torch.eye(D_IN)]
    dense = quantized_weight(base).dequantized(torch.float32)
    assert (dense.dtype, dense.shape) == (torch.float32, (D_OUT, D_IN))
    assert budget.error(dense, torch.stack(rows, 1).double()) <= 1e-6


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", FORMATS)
def test_fused_layer_is_as_exact_as_peft(name, case):
    compare_with_peft(name, case)


@pytest.mark.parametrize("case", ["float32", "bfloat16-float32-adapters"])
@pytest.mark.parametrize("name", ["nf4", "torchao-int8"])
def test_kernels_over_a_quantised_weight_are_as_exact_as_peft(name, case):
    with lf.set_backend("triton"):
        compare_with_peft(name, case)


def compare_with_peft(name, case):
    dtype, factor_dtype, autocast = CASES[case]
    theirs = peft_model(name, quantized(name, dtype), dtype=factor_dtype)
    ours = copy.deepcopy(theirs)
    assert len(lf.fuse_(ours).changed) == 1
    x, dy = draw(dtype)
    got = run(ours, x, dy, autocast)
    assert ours[0].fallback_reason is None
    if name.startswith("hqq") and autocast:
        with pytest.raises(RuntimeError, match="same dtype"):  # HQQ's backward multiplies dy and W of two dtypes
            run(theirs, x, dy, autocast)
        return
    wanted = run(theirs, x, dy, autocast)
    layer = theirs[0]
    a, b = (factor.detach().double() for factor in factors(layer))
    weight = quantized_weight(layer.base_layer).dequantized(torch.float64)
    truth = exact_results(
        x.double(), dy.double(), weight, layer.base_layer.bias.double(), a, b, layer.scaling["default"]
    )
    for key in got:
        assert got[key].dtype is wanted[key].dtype, key
        if case == "float32":
            assert budget.error(got[key], wanted[key].double()) <= FORMATS[name].apart, key
        computed, least = autocast or dtype, 0.0
        if key in ("da", "db") and not autocast:
            computed, least = factor_dtype, budget.least_error(dtype, factor_dtype)
        budget.check(key, got[key], truth[key], budget.error(wanted[key], truth[key]), computed, least)


def exact_results(x, dy, weight, bias, a, b, scaling):
    x, a, b = (tensor.clone().requires_grad_() for tensor in (x, a, b))
    y = x @ weight.t() + bias + scaling * (x @ a.t()) @ b.t()
    y.backward(dy)
    return {"y": y.detach(), "dx": x.grad, "da": a.grad, "db": b.grad}


@pytest.mark.parametrize("name", FORMATS)
def test_injected_layer_computes_what_peft_computes(name):
    theirs, ours = peft_model(name, quantized(name)), injected(quantized(name))
    wanted, got = run(theirs, *draw()), run(ours, *draw())
    assert ours[0].fallback_reason is None
    for key in got:
        assert budget.error(got[key], wanted[key].double()) <= FORMATS[name].apart, key


@pytest.mark.parametrize(("name", "backend"), [("nf4", "torch"), ("torchao-int8", "torch"), ("nf4", "triton")])
def test_dropout_drops_the_adapters_x_alone(name, backend):
    """S reads one column of x and y has S in one row, so that y shows the mask of the column."""
    model, p = nn.Sequential(quantized(name)), 0.4
    lf.inject_(model, lf.LoRAConfig(r=1, alpha=1, dropout=p))
    with torch.no_grad():
        model[0].lora_A.zero_()[0, 3] = 1.0
        model[0].lora_B.zero_()[7, 0] = 1.0
    x, dy = torch.ones(100, D_IN, requires_grad=True), torch.zeros(100, D_OUT)
    dy[:, 7] = 1.0
    with lf.set_backend(backend):
        y = model(x)
        y.backward(dy)
    added = (y - model[0].base(x)).detach()
    kept = added[:, 7] > 0.5
    torch.testing.assert_close(added[:, 7], kept / (1 - p), atol=1e-5, rtol=1e-5)
    assert not added[:, :7].any() and abs(kept.float().mean() - (1 - p)) < 4 * (p * (1 - p) / 100) ** 0.5
    through_w = quantized_weight(model[0].base).dequantized(torch.float32)[7]
    torch.testing.assert_close(x.grad[:, 3] - through_w[3], kept / (1 - p), atol=1e-5, rtol=1e-5)
    assert model.eval()(x).detach()[:, 7].sub(model[0].base(x)[:, 7]).sub(1.0).abs().max() < 1e-5


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_x_and_s_are_saved_and_nothing_else(name, dtype, dropout):
    model = injected(quantized(name, dtype), dropout)
    own, saved = {parameter.data_ptr() for parameter in factors(model[0])}, []
    x = draw(dtype)[0].requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda kept: kept):
        model(x)
    shapes = [(tuple(tensor.shape), tensor.dtype) for tensor in saved if tensor.data_ptr() not in own]
    assert shapes == [((2, 5, D_IN), dtype), ((10, RANK), torch.float32)]


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("kind", ["fused", "injected"])
@pytest.mark.parametrize("name", KINDS)
def test_copies_compute_the_same(name, kind, how):
    try:
        COPIES[how](quantized(name))
    except AttributeError as error:  # a method of the instance, for repr, which torchao's quantize_ sets
        pytest.skip(f"the library's own layer cannot be copied so: {error}")
    model = injected(quantized(name)) if kind == "injected" else peft_model(name, quantized(name))
    if kind == "fused":
        lf.fuse_(model)
    x, dy = draw()
    wanted = run(model, x, dy)
    copied = COPIES[how](model)
    copied.zero_grad()
    got = run(copied, x, dy)
    assert all(torch.equal(got[key], wanted[key]) for key in got) and copied[0].fallback_reason is None
    with torch.no_grad():
        factors(copied[0])[1].zero_()
    assert torch.equal(model(x), wanted["y"])  # which has its own factors


@pytest.mark.parametrize("name", KINDS)
def test_state_dict_is_the_librarys_beside_the_adapter(name):
    base, x = quantized(name), draw()[0]
    wanted, model = nn.Sequential(base).state_dict(), injected(base)
    state, y = model.state_dict(), model(x)
    assert state.keys() == wanted.keys() | {"0.lora_A", "0.lora_B"}
    assert all(type(state[key]) is type(wanted[key]) for key in wanted)
    other, plain = injected(quantized(name, seed=9)), nn.Sequential(quantized(name, seed=9))
    try:
        plain.load_state_dict(wanted)
    except RuntimeError as error:  # of bitsandbytes in 4 bits
        with pytest.raises(RuntimeError) as raised:
            other.load_state_dict(state)
        assert str(raised.value).splitlines()[1:] == str(error).splitlines()[1:]
    else:
        other.load_state_dict(state)
        assert torch.equal(other(x), y)
        del state["0.lora_B"]
        with pytest.raises(RuntimeError, match=r"Missing key.*0\.lora_B"):
            injected(quantized(name)).load_state_dict(state)


@pytest.mark.parametrize("name", FORMATS)
def test_a_moved_layer_computes_what_the_moved_librarys_layer_computes(name):
    base = quantized(name)
    model = nn.Sequential(copy.deepcopy(base))
    lf.inject_(model, lf.LoRAConfig(r=RANK))
    assert model.to("cpu")[0].lora_A.dtype is torch.float32
    moved, ours = nn.Sequential(base).to(torch.bfloat16), model.to(torch.bfloat16)
    for dtype in (torch.bfloat16, torch.float32):
        x = draw(dtype)[0]
        try:
            wanted = moved(x)
        except (RuntimeError, AssertionError):  # no product of these dtypes
            with pytest.raises((RuntimeError, AssertionError)):
                ours(x)
        else:
            assert torch.equal(ours(x), wanted) and ours(x).dtype is wanted.dtype


@pytest.mark.parametrize("part", [False, True], ids=["whole", "part"])
def test_a_change_in_place_shows_in_the_version(part):
    """torchao's tensors have a version of their own, and so have their parts."""
    base, other = quantized("torchao-int8"), quantized("torchao-int8", seed=9)
    weight = quantized_weight(base)
    version, address = weight._version, weight.data_ptr()
    with torch.no_grad():
        (base.weight.qdata if part else base.weight).copy_(other.weight.qdata if part else other.weight)
    assert weight._version > version and weight.data_ptr() == address != quantized_weight(other).data_ptr()


class Heads(nn.Module):
    """Three layers that read one x."""

    def __init__(self, name):
        super().__init__()
        self.q, self.k, self.v = (quantized(name, seed=seed) for seed in range(3))

    def forward(self, x):
        return self.q(x) * self.k(x) + self.v(x)


@pytest.mark.parametrize("name", KINDS)
def test_layers_of_one_x_are_one_op(name):
    torch.manual_seed(0)
    model, single = Heads(name), Heads(name)
    for heads, group in ((model, True), (single, False)):
        torch.manual_seed(1)
        lf.inject_(heads, lf.LoRAConfig(r=RANK), group=group)
        for layer in heads.children():
            nn.init.normal_(layer.lora_B, std=0.1)
    results = {}
    for heads in (model, single):
        x, dy = draw()
        x.requires_grad_()
        for _ in range(2):  # the first call finds the group
            heads.zero_grad()
            x.grad = None
            y = heads(x)
            y.backward(dy)
        results[heads] = [y, x.grad, *(p.grad for p in heads.parameters() if p.requires_grad)]
    assert lf.groups(model).groups == [("q", "k", "v")] and not lf.groups(single).groups
    for got, wanted in zip(results[model], results[single], strict=True):
        assert budget.error(got.detach(), wanted.detach().double()) <= 1e-6
