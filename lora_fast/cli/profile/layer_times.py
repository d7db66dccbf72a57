"""One layer of each shape by itself, on the activations and gradients that it met in the model: time, share of the
roofline, and how far its gradients are from float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from peft.tuners.lora import Linear as PeftLinear
from torch import Tensor, nn

from ...kernels.grouping import group_by
from ...measure.ceilings import Ceilings, layer_cost
from ...measure.clock import Clock, Spread
from .engines import BASE, EAGER, FUSED, Engines

CHECKED_TOKENS = 256  # for the gradients' errors: float64 is slow
ROUNDS = 10
LEAD_BYTES = 1 << 30


@dataclass
class Layer:
    """The layer ``name`` stands for ``count`` of its shape.

    Attributes:
        seconds: forward + backward, of base, PEFT eager and fused. share: the least seconds over them.
        error: PEFT eager and fused: the largest relative L2 error of dx, da and db against float64.
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
    """One row for each shape among the adapted layers, in the model's order. ``done`` after each."""
    shapes = by_shape(engines)
    doing("activations of the layers")
    seen = activations(engines, batch, [names[0] for names in shapes.values()])
    found = []
    for (d_in, d_out), names in shapes.items():
        doing(f"layer {d_in}→{d_out}")
        name = names[0]
        layers = {label: engines.found[label].model.get_submodule(name) for label in (EAGER, FUSED)}
        x, dy = seen[name]
        errors = gradient_errors(engines, layers, x, dy)
        layers[BASE] = layers[EAGER].get_base_layer()
        seconds = {label: Spread.of(times) for label, times in timed(engines, layers, x, dy).items()}
        share = {}
        for label, spread in seconds.items():
            r = 0 if label == BASE else rank
            work = layer_cost(x.numel() // d_in, d_in, d_out, r, engines.dtype.itemsize, adapter=4)
            share[label] = roof.least_seconds(work) / spread.median
        found.append(Layer(name, len(names), d_in, d_out, seconds, share, errors))
        done()
    return found


def by_shape(engines: Engines) -> dict[tuple[int, int], list[str]]:
    """(d_in, d_out) → names of the linear layers that PEFT has adapted."""
    modules = dict(engines.found[EAGER].model.named_modules())
    names = [name for name, module in modules.items() if isinstance(module, PeftLinear)]
    return group_by(names, lambda name: (modules[name].in_features, modules[name].out_features))


def activations(engines: Engines, batch: dict, names: list[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """Name → the layer's input and its output's gradient in one step of PEFT's eager model."""
    model = engines.found[EAGER].model
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
    """dx, da, db of one forward and backward pass; the layer's own gradients are cleared."""
    x = x.detach().requires_grad_()
    layer(x).backward(dy)
    trained = [p for p in layer.parameters() if p.requires_grad]
    found = [x.grad, *(p.grad for p in trained)]
    for p in trained:
        p.grad = None
    return found


def gradient_errors(engines: Engines, layers: dict[str, nn.Module], x: Tensor, dy: Tensor) -> dict[str, float]:
    """Label → the largest relative L2 error of dx, da and db against PEFT's eager layer in float64, without dropout."""
    x, dy = (tensor.flatten(0, -2)[:CHECKED_TOKENS] for tensor in (x, dy))
    dy = dy / dy.abs().amax()  # 16-bit gradients must not vanish
    exact = gradients(copy.deepcopy(layers[EAGER]).double().eval(), x.double(), dy.double())
    errors = {}
    for label, layer in layers.items():
        layer.eval()
        with engines.precision():
            found = gradients(layer, x, dy)
        layer.train()
        errors[label] = max(
            ((one.double() - true).norm() / true.norm()).item() for one, true in zip(found, exact, strict=True)
        )
    return errors


def timed(engines: Engines, layers: dict[str, nn.Module], x: Tensor, dy: Tensor) -> dict[str, list[float]]:
    """Label → seconds of forward + backward in each round, the layers taking turns.

    A GPU writes a large tensor before each: in the meantime the host queues the layer's launches, and the L2 cache
    loses what it holds of the operands.
    """
    lead = torch.empty(LEAD_BYTES, dtype=torch.uint8, device="cuda") if engines.device.type == "cuda" else None
    seconds: dict[str, list[float]] = {label: [] for label in layers}
    order = list(layers.items())
    for i in range(-1, ROUNDS):  # the first round warms up
        first = i % len(order)
        for label, layer in order[first:] + order[:first]:
            if lead is not None:
                lead.zero_()
            clock = Clock(engines.device)
            with engines.precision():
                gradients(layer, x, dy)
            clock.mark()
            if i >= 0:
                seconds[label] += clock.seconds()
    return seconds
