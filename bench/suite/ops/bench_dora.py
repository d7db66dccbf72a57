"""A DoRA layer, forward and backward: y = c∘(x Wᵀ + s x aᵀ bᵀ) for c = m / ‖W + s b a‖; dx, da, db, dm."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

import lora_fast as lf
from suite.cases import Case, Scale
from suite.comparison import Comparison, Provider, Setting
from suite.ops import bench_layer
from suite.ops.providers import Operands, ours, peft, provider


def cases(scale: Scale) -> list[Case]:
    return scale.layers("dora", scale.dropouts)


@dataclass
class Adapted:
    """The operands of a LoRA layer, and DoRA's magnitude, which is near the norms of W's rows."""

    op: Operands
    magnitude: Tensor

    @classmethod
    def of(cls, op: Operands) -> "Adapted":
        norms = op.weight.float().norm(dim=1).to(op.lora_A.dtype)
        return cls(op, (1.1 * norms).requires_grad_())

    def exact(self) -> dict[str, Tensor]:
        """Computes the results in float64 from the same values."""
        op = self.op
        x, weight, a, b, dy, m = (
            t.detach().double() for t in (op.x, op.weight, op.lora_A, op.lora_B, op.dy, self.magnitude)
        )
        total = weight + op.scaling * b @ a
        norms, s = total.norm(dim=1), x @ a.T
        du, u = dy * (m / norms), x @ total.T
        ds = op.scaling * (du @ b)
        grads = {"dx": du @ total, "da": ds.T @ x, "db": op.scaling * (du.T @ s), "dm": (dy * u).sum(0) / norms}
        return {"y": u * (m / norms)} | grads

    def with_magnitude(self, layer: Provider, magnitude: Tensor) -> Provider:
        """Returns a layer's provider whose magnitude is trained, too."""

        def prepare() -> None:
            layer.prepare()
            magnitude.grad = None

        results = lambda y: layer.results(y) | {"dm": magnitude.grad}
        return replace(layer, prepare=prepare, results=results, excluded=(*layer.excluded, magnitude))


def build(case: Case, setting: Setting) -> Comparison:
    op = Operands.of(case, setting.device)
    adapted = Adapted.of(op)
    providers: dict[str, Callable[[], Provider]] = {"PEFT": lambda: by_peft(adapted, case)}
    factors = op.weight, None, op.lora_A, op.lora_B

    def run() -> Tensor:
        return lf.functional.dora_linear(op.x, *factors, adapted.magnitude, op.scaling, case.dropout)

    for name, context in ours(case, setting).items():
        providers[name] = lambda context=context: adapted.with_magnitude(provider(op, run, context), adapted.magnitude)
    context = ours(case, setting)["ours"]
    lora = lambda: lf.functional.lora_linear(op.x, *factors, op.scaling, case.dropout)
    providers["LoRA"] = lambda: replace(provider(op, lora, context), results=None)
    return Comparison(providers, bench_layer.costs(op, case), adapted.exact if not case.dropout else None)


def by_peft(adapted: Adapted, case: Case) -> Provider:
    """Returns a provider of PEFT's layer with copies of a, b and the magnitude."""
    magnitude = nn.Parameter(adapted.magnitude.detach().to(torch.float32, copy=True))
    return adapted.with_magnitude(peft(adapted.op, case, torch.float32, magnitude=magnitude), magnitude)
