"""W += b diag(scale) a for every weight of some blocks: ScaLoRA's merge, rounded once at 16 bits. Every run starts from
the same weights, which are written back before the clock starts."""

from dataclasses import replace

import torch

import lora_fast
from lora_fast.measure.ceilings import Cost
from suite.cases import Case, Scale
from suite.comparison import Comparison, Provider, Setting, size
from suite.ops.pair_operands import Pairs
from suite.ops.providers import backend

PAIRS = 28  # those of four blocks, since each provider needs a copy of the weights


def cases(scale: Scale) -> list[Case]:
    return [
        replace(case, pairs=case.pairs[:PAIRS], dtype=dtype) for case in scale.steps("merge") for dtype in scale.dtypes
    ]


def build(case: Case, setting: Setting) -> Comparison:
    pairs = Pairs.of(case, setting.device)
    scale = torch.full((len(case.pairs), case.r), 1e-3, device=setting.device)

    def draw_weights() -> list[torch.Tensor]:
        generator = torch.Generator(setting.device).manual_seed(1)
        draw = lambda d_in, d_out: torch.randn(d_out, d_in, generator=generator, device=setting.device)
        return [draw(*shape).to(getattr(torch, case.dtype)) for shape in case.pairs]

    def eager(weights):
        for weight, a, b, d in zip(weights, pairs.a, pairs.b, scale, strict=True):
            weight.copy_(weight + (b * d) @ a)
        return weights

    def in_place(weights):
        for weight, a, b, d in zip(weights, pairs.a, pairs.b, scale, strict=True):
            weight.addmm_((b * d).to(weight.dtype), a.to(weight.dtype))
        return weights

    def ours(weights):
        ops = lora_fast.backend.ops("pairs", weights[0])
        ops.add_low_rank_(weights, pairs.a, pairs.b, scale, "nearest", 0)
        return weights

    def named(weights):
        return {str(i): weight for i, weight in enumerate(weights)}

    def provider(run, name: str = "auto") -> Provider:
        weights, start = draw_weights(), draw_weights()
        restore = lambda: torch._foreach_copy_(weights, start)
        return Provider(lambda: run(weights), results=named, prepare=restore, context=lambda: backend(name))

    def exact() -> dict[str, torch.Tensor]:
        return named(eager([weight.double() for weight in draw_weights()]))

    providers: dict = {"torch": lambda: provider(eager), "addmm_": lambda: provider(in_place)}
    providers["ours"] = lambda: provider(ours, "triton" if setting.triton else "torch")
    weights = draw_weights()
    operations = sum(2 * case.r * weight.numel() for weight in weights)
    cost = Cost(2 * size(*weights) + size(*pairs.a, *pairs.b), operations)
    return Comparison(providers, {"forward": cost}, exact)
