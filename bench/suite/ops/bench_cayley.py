"""The Cayley transform of NB-LoRA, forward and backward, with its trained scales (nuclear norm), of every adapter pair.
Ours is compared with the paper's formula under autograd, one layer after the other and batched over layers of a shape.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lora_fast.measure.ceilings import Cost
from lora_fast.ops import cayley as cayley_op
from suite.cases import Case, Scale
from suite.comparison import Comparison, Provider, Setting, size
from suite.ops.pair_operands import by_shape
from suite.ops.providers import backend


def cases(scale: Scale) -> list[Case]:
    return scale.steps("cayley")


class Free:
    """The free parameters of all pairs, and the gradients of a and b that backward starts from."""

    def __init__(self, case: Case, device: torch.device):
        generator = torch.Generator(device).manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device)

        self.a = [nn.Parameter(draw(case.r, d_in) / d_in**0.5) for d_in, _ in case.pairs]
        self.b = [nn.Parameter(draw(d_out, case.r) / d_out**0.5) for _, d_out in case.pairs]
        self.scale = [nn.Parameter(draw(case.r)) for _ in case.pairs]
        self.grads = [draw(*x.shape) for x in self.a + self.b]

    @property
    def lists(self) -> tuple[list[Tensor], ...]:
        return self.a, self.b, self.scale

    @property
    def tensors(self) -> list[Tensor]:
        return self.a + self.b + self.scale

    def double(self) -> Free:
        for x in self.tensors:
            x.data = x.data.double()
        self.grads = [g.double() for g in self.grads]
        return self


def ours(free_a, free_b, free_scale):
    n, rank = len(free_a), free_a[0].shape[0]
    return cayley_op.factors(cayley_op.Free(free_a, free_b, free_scale, [float(rank)] * n, [1.0] * n))


def formula(free_a, free_b, free_scale):
    """Computes a, and b with 2 sv in its columns, by the paper's formula, for a pair or stacked pairs of a shape."""
    r = free_a.shape[-2]
    a1, a2 = free_a[..., :r], free_a[..., r:]
    eye = torch.eye(r, device=free_a.device, dtype=free_a.dtype)
    inverse = torch.linalg.inv(eye + a1.mT - a1 + a2 @ a2.mT + free_b.mT @ free_b)
    scale = 2 * r * torch.softmax(free_scale / r**0.5, -1)
    return torch.cat([2 * inverse.mT - eye, -2 * inverse.mT @ a2], -1), -2 * free_b @ inverse * scale[..., None, :]


def looped(*free):
    return zip(*(formula(*parameters) for parameters in zip(*free, strict=True)), strict=True)


def batched(free_a, free_b, free_scale):
    shapes = tuple((a.shape[1], b.shape[0]) for a, b in zip(free_a, free_b, strict=True))
    all_a, all_b = {}, {}
    for indices in by_shape(shapes).values():
        a, b = formula(*(torch.stack([xs[i] for i in indices]) for xs in (free_a, free_b, free_scale)))
        all_a |= dict(zip(indices, a.unbind(), strict=True))
        all_b |= dict(zip(indices, b.unbind(), strict=True))
    return ([factors[i] for i in range(len(free_a))] for factors in (all_a, all_b))


def build(case: Case, setting: Setting) -> Comparison:
    def provider(
        function: Callable, name: str = "auto", keeps: Callable = lambda factors: ()
    ) -> Callable[[], Provider]:
        def build_provider() -> Provider:
            free = Free(case, setting.device)

            def forward():
                return [x for factors in function(*free.lists) for x in factors]

            def backward(factors):
                torch.autograd.backward(factors, free.grads)

            def prepare():
                for x in free.tensors:
                    x.grad = None

            results = lambda factors: named(free, factors)
            return Provider(forward, backward, results, prepare, lambda: backend(name), free.tensors, keeps=keeps)

        return build_provider

    def exact() -> dict[str, Tensor]:
        free = Free(case, setting.device).double()
        factors = [x for tensors in looped(*free.lists) for x in tensors]
        torch.autograd.backward(factors, free.grads)
        return {name: t.detach() for name, t in named(free, factors).items()}

    free = Free(case, setting.device)
    forward = Cost(2 * size(*free.a, *free.b), sum(4 * case.r * x.numel() for x in free.a + free.b))
    backward = Cost(3 * size(*free.a, *free.b), 2 * forward.operations)
    costs = {"forward": forward, "backward": backward, "full": Cost(*map(sum, zip(forward, backward, strict=True)))}
    providers = {"torch, loop": provider(looped), "torch, batched": provider(batched)}
    inverses = lambda factors: factors[0].grad_fn.inverses  # kept on the graph's node, not as saved tensors
    providers["ours"] = provider(ours, "triton" if setting.triton else "torch", inverses)
    return Comparison(providers, costs, exact)


def named(free: Free, factors: list[Tensor]) -> dict[str, Tensor]:
    gradients = {f"d{i}": x.grad for i, x in enumerate(free.tensors)}
    return gradients | {str(i): x for i, x in enumerate(factors)}
