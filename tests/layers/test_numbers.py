"""Scalings and dropout probabilities as people pass them, and PEFT's hot-swapping, which makes scalings tensors."""

import copy
import math
from decimal import Decimal
from fractions import Fraction

import numpy as np
import peft
import pytest
import torch
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import lora_fast as lf
from lora_fast.functional import linear as functional_linear
from lora_fast.functional import lora_linear

BACKENDS = pytest.mark.parametrize("backend", ["torch", "triton"])
TWO = {
    "int": 2,
    "bool": True,
    "float32 of numpy": np.float32(2),
    "int of numpy": np.int64(2),
    "bool of numpy": np.bool_(True),
    "array of numpy": np.array(2.0),
    "0-d tensor": torch.tensor(2.0),
    "int tensor": torch.tensor(2),
    "bool tensor": torch.tensor(True),
    "float64 tensor": torch.tensor(2.0, dtype=torch.float64),
    "tensor of one element": torch.tensor([2.0]),
    "matrix of one element": torch.tensor([[2.0]]),
}
EACH = pytest.mark.parametrize("scaling", TWO.values(), ids=TWO)


def arguments(dtype=torch.float32) -> list[torch.Tensor]:
    torch.manual_seed(0)
    x, weight, bias, a, b = (torch.randn(shape).to(dtype) for shape in ((4, 6), (5, 6), (5,), (2, 6), (5, 2)))
    return [x.requires_grad_(), weight, bias, a.requires_grad_(), b.requires_grad_()]


def results(run, *leaves) -> list[torch.Tensor]:
    y = run()
    return [y, *torch.autograd.grad(y.square().sum(), leaves)]


def peft_models(scaling, dtype=torch.float32, **options) -> list[nn.Module]:
    """Returns PEFT's model and the fused one, with the scaling in each layer."""
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False, **options)
    plain = peft.get_peft_model(nn.Sequential(nn.Linear(6, 5)), config, autocast_adapter_dtype=False).to(dtype)
    fused = copy.deepcopy(plain)
    lf.fuse_(fused)
    for model in (plain, fused):
        model.base_model.model[0].scaling["default"] = scaling
    return [plain, fused]


@BACKENDS
@EACH
def test_function_takes_every_number(scaling, backend):
    x, weight, bias, a, b = arguments()
    with lf.set_backend(backend):
        got = results(lambda: lora_linear(x, weight, bias, a, b, scaling), x, a, b)
        expected = results(lambda: lora_linear(x, weight, bias, a, b, float(scaling)), x, a, b)
    torch.testing.assert_close(got, expected)


@BACKENDS
@EACH
def test_layers_take_every_number(scaling, backend):
    layer, x = lf.LoRALinear(6, 5, r=2, alpha=4), torch.randn(4, 6)
    nn.init.normal_(layer.lora_B)
    with lf.set_backend(backend):
        layer.scaling = float(scaling)
        expected = results(lambda: layer(x), layer.lora_A, layer.lora_B)
        layer.scaling = scaling
        torch.testing.assert_close(results(lambda: layer(x), layer.lora_A, layer.lora_B), expected)
        plain, fused = peft_models(scaling)
        with torch.no_grad():  # with gradients torch cannot multiply by an array
            torch.testing.assert_close(fused(x), plain(x))
        assert fused.base_model.model[0].fallback_reason is None


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scaling_in_a_tensor_gets_its_gradient(dtype, backend):
    """It is learned, as a parameter of the layer or of PEFT's."""
    x, weight, bias, a, b = arguments(dtype)
    scaling = nn.Parameter(torch.tensor(1.5))
    with lf.set_backend(backend):
        got = results(lambda: lora_linear(x, weight, bias, a, b, scaling), scaling, x, a, b)
    wide = [t.detach().double().requires_grad_() for t in (scaling, x, a, b)]
    s, x, a, b = wide
    exact = results(lambda: x @ weight.double().T + bias.double() + s * (x @ a.T @ b.T), *wide)
    tolerance = 1e-5 if dtype is torch.float32 else 2e-2
    for g, e in zip(got, exact, strict=True):
        assert (g.double() - e).norm() <= tolerance * e.norm()
    plain, fused = peft_models(scaling)
    grads = [torch.autograd.grad(model(torch.ones(3, 6)).sum(), scaling)[0] for model in (plain, fused)]
    torch.testing.assert_close(*grads)
    layer = lf.LoRALinear(6, 5, r=2, alpha=4)
    nn.init.normal_(layer.lora_B)
    layer.scaling = nn.Parameter(torch.tensor(2.0))
    layer(torch.ones(3, 6)).sum().backward()
    assert layer.scaling.grad.abs() > 0 and layer.fallback_reason is None


def test_scaling_on_a_gpu_is_not_read_on_the_host():
    """Fake tensors know shapes, dtypes and devices alone: reading one on the host is an error."""
    with FakeTensorMode():
        x, b = torch.empty(4, 6, device="cuda"), torch.empty(5, 2, device="cuda")
        for place in ("cuda", "cpu"):
            scaling, _ = functional_linear._plain_numbers(torch.ones(1, device=place), 0.0, x)
            assert (b * scaling).device.type == "cuda" and scaling.dim() == 0


REFUSED = {
    "nan": math.nan,
    "inf": math.inf,
    "None": None,
    "text": "2",
    "complex": 2j,
    "two elements": torch.ones(2),
    "complex tensor": torch.tensor(2j),
    "another device": torch.ones((), device="meta"),
    "array of two": np.ones(2),
    "Fraction": Fraction(1, 2),
    "Decimal": Decimal(2),
}


@pytest.mark.parametrize("scaling", REFUSED.values(), ids=REFUSED)
def test_other_scalings_are_refused_by_name_and_left_to_peft(scaling):
    """PEFT multiplies by whatever it is, or torch raises: the fused layer does the same."""
    layer, x = lf.LoRALinear(6, 5, r=2, alpha=4), torch.randn(4, 6)
    layer.scaling = scaling
    with pytest.raises(lf.ArgumentError, match="scaling: expected a finite number"):
        layer(x)
    outcomes = []
    for model in peft_models(scaling):
        try:
            outcomes.append(model(x))
        except (TypeError, RuntimeError) as error:
            outcomes.append(type(error))
    if isinstance(outcomes[0], torch.Tensor):
        torch.testing.assert_close(outcomes[1], outcomes[0], equal_nan=True)
    else:
        assert outcomes[1] is outcomes[0]
    assert model.base_model.model[0].fallback_reason.startswith("scaling ")


@pytest.mark.parametrize("change", ["set_scale", "scale_layer", "unscale_layer"])
@pytest.mark.parametrize("factor", [2, np.float32(3), torch.tensor(0.5)], ids=["int", "numpy", "tensor"])
def test_peft_rescales_fused_layers(change, factor):
    outputs = []
    for model in peft_models(1.5):
        layer = model.base_model.model[0]
        arguments = ("default", factor) if change == "set_scale" else (factor,)
        getattr(layer, change)(*arguments)
        outputs.append(model(torch.ones(3, 6)))
    torch.testing.assert_close(*outputs)
    assert layer.fallback_reason is None


PROBABILITIES = {
    "int": 0,
    "bool": True,
    "float32 of numpy": np.float32(0.5),
    "array of numpy": np.array(0.5),
    "0-d tensor": torch.tensor(0.5),
}


@pytest.mark.parametrize("p", PROBABILITIES.values(), ids=PROBABILITIES)
def test_dropout_takes_every_number(p):
    x, weight, bias, a, b = arguments()
    expected = lora_linear(x, weight, bias, a, b, 1.5, float(p), seed=3)
    torch.testing.assert_close(lora_linear(x, weight, bias, a, b, 1.5, p, seed=3), expected)
    fused = peft_models(1.5)[1]
    fused.base_model.model[0].lora_dropout["default"] = nn.Dropout(0.1)
    fused.base_model.model[0].lora_dropout["default"].p = p
    assert fused(x).shape == (4, 5) and fused.base_model.model[0].fallback_reason is None


@pytest.mark.parametrize("name", ["x", "weight", "lora_A", "lora_B"])
def test_other_arguments_are_checked_beside_a_scaling_in_a_tensor(name):
    for wrong in (None, "text", [1.0], 3, torch.ones(2), torch.ones(7, 7), torch.ones(5, 2, dtype=torch.int64)):
        values = dict(zip(("x", "weight", "bias", "lora_A", "lora_B"), arguments(), strict=True)) | {name: wrong}
        with pytest.raises(lf.ArgumentError, match=r"^(x|weight|bias|lora_A|lora_B): expected"):
            lora_linear(**values, scaling=torch.tensor(2.0))


@pytest.mark.parametrize("p", [-0.1, 1.5, "0.5", None], ids=str)
def test_wrong_probability_is_refused_by_name(p):
    with pytest.raises(lf.ArgumentError, match="dropout_p: expected a probability"):
        lora_linear(*arguments(), 1.5, p)


@BACKENDS
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_hot_swapped_adapters_give_pefts_results_without_compiling_again(compiled, backend, tmp_path):
    def build(seed, **options):
        torch.manual_seed(0)
        base = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
        torch.manual_seed(seed)
        return peft.get_peft_model(base, peft.LoraConfig(target_modules=["0", "2"], init_lora_weights=False, **options))

    for seed, options in enumerate(({"r": 6, "lora_alpha": 3}, {"r": 2, "lora_alpha": 9})):
        build(5 + seed, **options).save_pretrained(tmp_path / str(seed))
    plain = build(1, r=4, lora_alpha=8)
    fused = copy.deepcopy(plain)
    lf.fuse_(fused)
    for model in (plain, fused):
        prepare_model_for_compiled_hotswap(model, target_rank=8)
    torch._dynamo.reset()
    run, x = torch.compile(fused, backend="aot_eager", fullgraph=True) if compiled else fused, torch.randn(3, 16)
    with lf.set_backend(backend), torch._dynamo.config.patch(error_on_recompile=True):
        torch.testing.assert_close(run(x), plain(x))
        for seed in range(2):
            for model in (plain, fused):
                hotswap_adapter(model, tmp_path / str(seed), adapter_name="default")
            torch.testing.assert_close(run(x), plain(x))
    if not compiled:
        assert all(layer.fallback_reason is None for layer in fused.base_model.model[::2])
