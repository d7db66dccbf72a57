"""Measures one layer of each shape by itself, on activations and gradients from the model: its time, its share of the
roofline, and the error of its gradients against float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ...kernels.grouping import group_by
from ...measure.ceilings import Ceilings, layer_cost
from ...measure.clock import Clock, Spread, flush_cache, keep_busy, turns
from ...measure.memory import distinct_bytes, elements, stored
from ...quantized import QuantizedWeight, quantized_weight
from .engines import BASE, EAGER, FUSED, Engines

CHECKED_TOKENS = 256  # for the errors of the gradients, since float64 is slow
ROUNDS = 10
HEAD_START = 3e-3  # seconds in which the host enqueues a layer's launches


@dataclass
class Layer:
    """The figures of layer ``name``, which represents the ``count`` layers of its shape.

    Attributes:
        seconds: of forward + backward, for base, PEFT eager and fused.
        share: the least possible seconds over the median, for the same three.
        error: the largest relative L2 error of dx, da and db against float64, for PEFT eager and fused.
    """

    name: str
    count: int
    d_in: int
    d_out: int
    seconds: dict[str, Spread]
    share: dict[str, float]
    error: dict[str, float]


def measure(
    engines: Engines, batch: dict, rank: int, roof: Ceilings, doing: Callable[[str], None], done: Callable[[], None]
) -> list[Layer]:
    """Measures a layer of each shape among the adapted layers, in the model's order. Calls ``done`` after each."""
    shapes = by_shape(engines)
    doing("activations of the layers")
    inputs = activations(engines, batch, [names[0] for names in shapes.values()])
    rows = []
    for (d_in, d_out), names in shapes.items():
        doing(f"layer {d_in}→{d_out}")
        name = names[0]
        layers = {label: engines.by_label[label].model.get_submodule(name) for label in (EAGER, FUSED)}
        x, dy = inputs[name]
        errors = gradient_errors(engines, layers, x, dy)
        layers[BASE] = _base(layers[EAGER])
        seconds = {label: Spread.of(times) for label, times in timed(engines, layers, x, dy).items()}
        weight, share = _weight_bytes(layers[BASE]), {}
        for label, spread in seconds.items():
            r = 0 if label == BASE else rank
            cost = layer_cost(x.numel() // d_in, d_in, d_out, r, engines.dtype.itemsize, weight, adapter=4)
            share[label] = roof.least_seconds(cost) / spread.median
        rows.append(Layer(name, len(names), d_in, d_out, seconds, share, errors))
        done()
    return rows


def by_shape(engines: Engines) -> dict[tuple[int, int], list[str]]:
    """Returns (d_in, d_out) → names of the linear layers that PEFT has adapted."""
    modules = dict(engines.by_label[EAGER].model.named_modules())
    linear = (nn.Linear, Conv1D)
    names = [
        name for name, module in modules.items() if isinstance(module, LoraLayer) and isinstance(_base(module), linear)
    ]
    return group_by(names, lambda name: (modules[name].in_features, modules[name].out_features))


def activations(engines: Engines, batch: dict, names: list[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """Returns name → the layer's input and the gradient of its output in one step of PEFT's eager model."""
    model = engines.by_label[EAGER].model
    seen: dict[str, list[Tensor]] = {name: [] for name in names}

    def watch(name: str):
        def keep(module, inputs, output):
            seen[name].append(inputs[0].detach())
            output.register_hook(lambda gradient: seen[name].append(gradient.detach().clone()))

        return keep

    hooks = [model.get_submodule(name).register_forward_hook(watch(name)) for name in names]
    with engines.precision():
        loss = model(**batch).loss
    loss.backward()
    for hook in hooks:
        hook.remove()
    model.zero_grad()
    return {name: (x, dy) for name, (x, dy) in seen.items()}


def gradients(layer: nn.Module, x: Tensor, dy: Tensor) -> list[Tensor]:
    """Returns dx, da and db of one forward and backward pass, and clears the layer's own gradients."""
    x = x.detach().requires_grad_()
    layer(x).backward(dy)
    trained = [p for p in layer.parameters() if p.requires_grad]
    results: list[Tensor] = []
    for tensor in (x, *trained):
        assert tensor.grad is not None, "the output depends on the input and on every trained parameter"
        results.append(tensor.grad)
        tensor.grad = None
    return results


def gradient_errors(engines: Engines, layers: dict[str, nn.Module], x: Tensor, dy: Tensor) -> dict[str, float]:
    """Returns label → the largest relative L2 error of dx, da, db against PEFT's layer in float64, without dropout."""
    x, dy = (tensor.flatten(0, -2)[:CHECKED_TOKENS] for tensor in (x, dy))
    dy = dy / dy.abs().amax()  # a mean loss makes gradients so small that 16 bits would round them to zero
    exact = gradients(_in_float64(layers[EAGER]), x.double(), dy.double())
    errors = {}
    for label, layer in layers.items():
        layer.eval()
        with engines.precision():
            results = gradients(layer, x, dy)
        layer.train()
        errors[label] = max(
            ((got.double() - true).norm() / true.norm()).item() for got, true in zip(results, exact, strict=True)
        )
    return errors


def _base(layer: Any) -> Any:
    """Returns the frozen layer in one of PEFT's layers."""
    return layer.get_base_layer()


def _weight_bytes(base: nn.Module) -> float:
    """Returns the bytes that an element of the layer's weight takes, with its share of the scales."""
    weight = base.get_parameter("weight")
    return distinct_bytes(stored(weight)) / elements(weight)


def _in_float64(layer: nn.Module) -> nn.Module:
    """Returns a copy of one of PEFT's layers in float64, over the dequantised weight if its weight is quantised."""
    exact: Any = copy.deepcopy(layer)
    weight, bias = quantized_weight(_base(layer)), _base(layer).bias
    if isinstance(weight, QuantizedWeight):
        d_out, d_in = weight.shape
        dense = nn.Linear(d_in, d_out, bias=False, device="meta", dtype=torch.float64)
        dense.weight = nn.Parameter(weight.dequantized(torch.float64), requires_grad=False)
        dense.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach(), requires_grad=False))
        exact.base_layer = dense
    double: nn.Module = exact.double().eval()
    return double


def timed(engines: Engines, layers: dict[str, nn.Module], x: Tensor, dy: Tensor) -> dict[str, list[float]]:
    """Returns label → seconds of forward + backward in each round, the layers taking turns.

    On a GPU the L2 cache is overwritten before each run, and the device is kept busy while the host enqueues it.
    """
    seconds: dict[str, list[float]] = {label: [] for label in layers}
    for turn, label in turns(list(layers), ROUNDS):
        flush_cache(engines.device)
        keep_busy(engines.device, HEAD_START)
        clock = Clock(engines.device)
        with engines.precision():
            gradients(layers[label], x, dy)
        clock.mark()
        taken = clock.seconds()
        if turn >= 0:
            seconds[label] += taken
    return seconds
