"""The layer's forward without gradients for one token, as in generation: y = x Wᵀ + s (x aᵀ) bᵀ."""

from collections.abc import Callable
from dataclasses import replace

import torch

from suite.cases import Case, Scale
from suite.comparison import Comparison, Provider, Setting
from suite.ops import bench_layer
from suite.ops.providers import layer


def cases(scale: Scale) -> list[Case]:
    return [replace(case, n_tokens=1) for case in scale.layers("decode")]


def build(case: Case, setting: Setting) -> Comparison:
    op, providers = layer(case, setting)
    forward = bench_layer.costs(op, case)["forward"]
    return Comparison(
        {name: without_gradients(build) for name, build in providers.items()},
        {"forward": forward},
        lambda: {"y": op.exact()["y"]},
    )


def without_gradients(build: Callable[[], Provider]) -> Callable[[], Provider]:
    """Returns a builder of a layer's provider that runs its forward alone, under ``torch.no_grad``."""

    def forward_alone() -> Provider:
        provider = build()
        results = provider.results and (lambda y: {"y": y})
        return replace(provider, forward=torch.no_grad()(provider.forward), backward=None, results=results)

    return forward_alone
