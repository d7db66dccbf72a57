"""Autograd's fine print for every adapter layer: selective checkpointing, outputs changed in place, backward in another
autocast region, tensors made under inference_mode, hooks on saved tensors, and several threads through one model."""

import copy
import functools

import peft
import pytest
import torch
from together import run_together
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
    set_checkpoint_early_stop,
)

import lora_fast as lf

aten = torch.ops.aten
CONFIGS = {
    "LoRALinear": lf.LoRAConfig(r=4, dropout=0.3),
    "DoRALinear": lf.LoRAConfig(r=4, use_dora=True),
    "NBLoRALinear": lf.NBLoRAConfig(r=4, dropout=0.3),
    "SingLoRALinear": lf.SingLoRAConfig(r=4, dropout=0.3, ramp_steps=0),
}
KINDS = ["fused PEFT", *CONFIGS]
EACH_KIND = pytest.mark.parametrize("kind", KINDS)
# All kinds call one op, so one of them is enough for the kernels, which are slow in the interpreter.
CASES = [*((kind, "torch") for kind in KINDS), ("LoRALinear", "triton")]
EACH_KIND_AND_BACKEND = pytest.mark.parametrize(("kind", "backend"), CASES, ids=[" ".join(case) for case in CASES])


def model_of(kind: str, bias: bool = True, fuse: bool = True, use_dora: bool = False) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12, bias), nn.GELU(), nn.Linear(12, 8, bias))
    if kind in CONFIGS:
        lf.inject_(model, CONFIGS[kind], progress=False)
    else:
        config = peft.LoraConfig(r=4, lora_dropout=0.3, target_modules=["0", "2"], use_dora=use_dora)
        model = peft.get_peft_model(model, config)
        if fuse:
            lf.fuse_(model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    return model


def gradients(model: nn.Module, run=None, x: torch.Tensor | None = None) -> list[torch.Tensor]:
    torch.manual_seed(3)
    model.zero_grad()
    x = torch.randn(2, 3, 8) if x is None else x
    x = x.detach().requires_grad_()
    (run or model)(x).square().sum().backward()
    return [x.grad, *(p.grad.clone() for p in model.parameters() if p.requires_grad)]


# ── selective checkpointing ──────────────────────────────────────────────────────────────────────────────────────────

POLICIES = {
    "mm and addmm": [aten.mm.default, aten.addmm.default],
    "bmm and linear": [aten.bmm.default, aten.linear.default],
    "our ops": [torch.ops.lora_fast.lora_linear.default, torch.ops.lora_fast.cayley.default],
    "everything": lambda context, op, *args, **kwargs: CheckpointPolicy.MUST_SAVE,
    "nothing": lambda context, op, *args, **kwargs: CheckpointPolicy.MUST_RECOMPUTE,
}


@EACH_KIND_AND_BACKEND
@pytest.mark.parametrize("policy", POLICIES)
def test_selective_checkpointing_has_the_gradients_of_none(policy, kind, backend):
    """The region has products of its own after the layers, which must not get the results of others."""
    model = model_of(kind)

    def region(x):
        y = model(x)
        return (y @ y.mT) @ y * 0.5 + torch.bmm(y, y.mT) @ y

    contexts = functools.partial(create_selective_checkpoint_contexts, POLICIES[policy])
    within = lambda x: checkpoint(region, x, use_reentrant=False, context_fn=contexts)
    nested = lambda x: checkpoint(lambda x: within(x).sin(), x, use_reentrant=False)
    with lf.set_backend(backend):
        expected = gradients(model, region)
        with set_checkpoint_early_stop(policy != "bmm and linear"):
            # DoRA's op is two under a mode of torch, whose sums are rounded at other places.
            tolerance = {"rtol": 1e-4, "atol": 1e-6} if kind == "DoRALinear" else {"rtol": 0, "atol": 0}
            torch.testing.assert_close(gradients(model, within), expected, **tolerance)
            if policy in ("mm and addmm", "everything"):
                torch.testing.assert_close(gradients(model, nested), gradients(model, lambda x: region(x).sin()))


# ── in place ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def checkpointed(model):
    return lambda x: checkpoint(model, x, use_reentrant=False)


def merged(model):
    lf.merge_(model)
    return model


@EACH_KIND_AND_BACKEND
@pytest.mark.parametrize("way", [lambda model: model, checkpointed, merged], ids=["plain", "checkpointed", "merged"])
def test_output_may_be_changed_in_place(way, kind, backend):
    for bias, shape in ((True, (3, 8)), (False, (2, 3, 8)), (True, (2, 3, 8)), (True, (8,)), (False, (2, 0, 8))):
        results = []
        for in_place in (False, True):
            run = way(model_of(kind, bias).eval())
            x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).requires_grad_()
            with lf.set_backend(backend):
                y = run(x)
            assert not y._is_view() or way is merged  # as nn.Linear's
            y = y.add_(x).relu_() if in_place else (y + x).relu()
            (y * y).sum().backward()
            results.append([y.detach(), x.grad])
        torch.testing.assert_close(*results)


# ── states of torch around a call ────────────────────────────────────────────────────────────────────────────────────


@EACH_KIND_AND_BACKEND
@pytest.mark.parametrize("forward", [None, torch.bfloat16, torch.float16], ids="forward {}".format)
def test_backward_ignores_its_own_autocast_region(forward, kind, backend):
    """Forward has cast the tensors. PEFT's backward casts once more and loses precision, ours does not."""
    model = model_of(kind).eval()
    region = lambda dtype: torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None)

    def train(backward):
        model.zero_grad()
        x = torch.linspace(-1, 1, 48).view(2, 3, 8).requires_grad_()
        with lf.set_backend(backend), region(forward):
            y = model[0](x) if kind in CONFIGS else model.base_model.model[0](x)
        dy = y.detach().cos()
        with region(backward):
            y.backward(dy)
        return [x.grad, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    expected = train(forward)
    for other in (None, torch.bfloat16, torch.float16):
        torch.testing.assert_close(train(other), expected, rtol=0, atol=0)


@EACH_KIND
def test_saved_tensors_may_be_packed(kind):
    model = model_of(kind)
    with torch.autograd.graph.save_on_cpu():
        packed = gradients(model)
    torch.testing.assert_close(packed, gradients(model), rtol=0, atol=0)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.numpy(force=True), torch.from_numpy):
        packed = gradients(model)
    torch.testing.assert_close(packed, gradients(model), rtol=0, atol=0)


def states(model, x):
    """Yields names and functions that call the model as a user may around inference_mode; each returns tensors."""

    def made_inside():
        with torch.inference_mode():
            y = x.clone()
        return y

    def trained_on(y):
        model.zero_grad()
        model(y).sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.requires_grad]

    def outside(y):
        with torch.inference_mode():
            z = model(y)
        return [z.clone(), *trained_on(z.clone())]

    yield "input from inside", lambda: trained_on(made_inside())
    yield "cloned input from inside", lambda: trained_on(made_inside().clone())
    yield "output of inside", lambda: outside(x)
    yield "no_grad, then trained", lambda: [torch.no_grad()(model)(x), *trained_on(x)]

    def model_made_inside():
        with torch.inference_mode():
            inner = copy.deepcopy(model)
        return [torch.no_grad()(inner)(x), torch.inference_mode()(inner)(x).clone()]

    yield "model from inside", model_made_inside

    def trained_inside():
        with torch.inference_mode():
            inner = copy.deepcopy(model)
        inner(x).sum().backward()
        return [p.grad for p in inner.parameters() if p.requires_grad]

    yield "model from inside, trained", trained_inside

    def forward_with_gradients():
        with torch.inference_mode():
            inner = copy.deepcopy(model)
        y = inner(x)
        return [y, torch.tensor(y.requires_grad)]

    yield "model from inside, gradients enabled", forward_with_gradients

    def base_made_inside():
        inner = copy.deepcopy(model)
        with torch.inference_mode():
            for module in inner.modules():
                frozen = {name: p.clone() for name, p in module._parameters.items() if p is not None}
                frozen = {name: p for name, p in frozen.items() if not module._parameters[name].requires_grad}
                module._parameters.update({name: torch.nn.Parameter(p, False) for name, p in frozen.items()})
        first = next(module for module in inner.modules() if hasattr(module, "lora_A"))  # its input has no gradient
        first(x).sum().backward()
        return [p.grad for p in inner.parameters() if p.grad is not None]

    yield "base from inside, input without gradient", base_made_inside


@EACH_KIND_AND_BACKEND
def test_inference_mode_is_as_for_plain_layers(kind, backend):
    """What PEFT's layers can do, ours can, with equal results; what is torch's own error with them is one with ours."""
    x = torch.randn(3, 8)
    plain = [call for _, call in states(model_of("fused PEFT", fuse=False, use_dora=kind == "DoRALinear").eval(), x)]
    for (name, call), reference in zip(states(model_of(kind).eval(), x), plain, strict=True):
        outcomes = []
        for run in (reference, call):
            with lf.set_backend(backend):
                try:
                    outcomes.append(run())
                except RuntimeError as error:
                    outcomes.append(error)
        assert isinstance(outcomes[0], RuntimeError) == isinstance(outcomes[1], RuntimeError), (name, outcomes)
        if kind == "fused PEFT" and not isinstance(outcomes[0], RuntimeError):
            torch.testing.assert_close(outcomes[1], outcomes[0])


# ── threads ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@EACH_KIND
def test_threads_through_one_model_add_their_gradients(kind):
    """Each thread runs forward and backward, some checkpointed and in another mode of autograd than the others."""
    model = model_of(kind).eval()
    inputs, steps = torch.randn(4, 2, 3, 8), 5
    expected = [sum(parts) * steps for parts in zip(*(gradients(model, x=x)[1:] for x in inputs), strict=True)]
    outputs = [model(x).detach() for x in inputs]
    model.zero_grad()

    def train(i: int) -> None:
        run = model if i % 2 else checkpointed(model)
        for _ in range(steps):
            y = run(inputs[i])
            torch.testing.assert_close(y.detach(), outputs[i])
            y.square().sum().backward()

    def evaluate() -> None:
        for _ in range(steps):
            with torch.no_grad():
                torch.testing.assert_close(model(inputs[0]), outputs[0])

    run_together(*(functools.partial(train, i) for i in range(4)), evaluate)
    got = [p.grad for p in model.parameters() if p.requires_grad]
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-4)


# ── frozen factors ───────────────────────────────────────────────────────────────────────────────────────────────────


def freeze(model: nn.Module, names: tuple[str, ...]) -> nn.Module:
    for name, parameter in model.named_parameters():
        if any(part in name for part in names):
            parameter.requires_grad_(False)
    return model


FROZEN = {"a": ("lora_A",), "b": ("lora_B",), "both": ("lora_A", "lora_B")}
LORA_KINDS = pytest.mark.parametrize("kind", ["fused PEFT", "LoRALinear"])
EACH_BACKEND = pytest.mark.parametrize("backend", ["torch", "triton"])


@LORA_KINDS
@EACH_BACKEND
@pytest.mark.parametrize("frozen", FROZEN)
@pytest.mark.parametrize("trains_x", [True, False], ids=["x", "no x"])
def test_layer_with_frozen_factors_has_the_gradients_of_the_trained_one(trains_x, frozen, backend, kind):
    if frozen == "both" and not trains_x:
        pytest.skip("nothing to train")
    model, x = model_of(kind), torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(1))
    everything = copy.deepcopy(model)
    freeze(model, FROZEN[frozen])
    results = []
    for each in (model, everything):
        torch.manual_seed(3)  # of the dropout masks
        inputs = x.clone().requires_grad_(trains_x)
        with lf.set_backend(backend):
            each(inputs).square().sum().backward()
        results.append({"x": inputs.grad} | {name: p.grad for name, p in each.named_parameters()})
    for name, grad in results[0].items():
        if grad is not None:
            torch.testing.assert_close(grad, results[1][name], rtol=0, atol=0, msg=name)
    assert sum(grad is not None for grad in results[0].values()) == trains_x + (frozen != "both") * 2


def first_layer(kind: str):
    """Returns a layer 8 → 12 with a frozen a, and its trained b."""
    model = freeze(model_of(kind), FROZEN["a"]).eval()
    layer = model[0] if kind == "LoRALinear" else model.base_model.model[0]
    return layer, next(parameter for parameter in layer.parameters() if parameter.requires_grad)


@LORA_KINDS
@EACH_BACKEND
def test_layer_with_a_frozen_a_keeps_s_alone(backend, kind):
    """As PEFT's, so that x takes no memory (LoRA-FA) and may be changed in place or made under inference_mode."""
    layer, _ = first_layer(kind)
    kept = []
    keep = lambda tensor: (kept.append(tuple(tensor.shape)), tensor)[1]
    with lf.set_backend(backend):
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            layer(torch.randn(5, 8))
        assert kept == [(5, 4)]
        x = torch.randn(5, 8, requires_grad=True) * 2
        y = layer(x).sum()
        x.relu_()
        y.backward()
        with torch.inference_mode():
            x = torch.randn(5, 8)
        layer(x).sum().backward()


@LORA_KINDS
def test_second_derivatives_with_a_frozen_a(kind):
    """Those that need x, which is not kept, are refused by name; the others are right."""
    layer, b = first_layer(kind)
    x, results = torch.randn(5, 8), []
    if kind == "LoRALinear":
        linear, a, scaling = layer.to_linear(), layer.lora_A, layer.scaling
    else:
        linear, a, scaling = layer.base_layer, layer.lora_A["default"].weight, layer.scaling["default"]
    exact = lambda x: linear(x) + scaling * x @ a.T @ b.T
    for run in (layer, exact):
        (grad,) = torch.autograd.grad(run(x).square().sum(), b, create_graph=True)
        results.append(torch.autograd.grad(grad.square().sum(), b)[0])
    torch.testing.assert_close(*results)
    x.requires_grad_()
    with pytest.raises(RuntimeError, match="second derivatives of a layer with a frozen lora_A"):
        torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
