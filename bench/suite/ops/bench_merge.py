"""W += b diag(scale) a for every weight of some blocks: what ScaLoRA merges, at 16 bits rounded once. Every run begins
with the same weights, written back before the clock starts."""

from dataclasses import replace

import torch

import lora_fast
from suite.cases import Case, Scale
from suite.comparison import Comparison, Cost, Provider, Setting, size
from suite.ops.pair_operands import Pairs
from suite.ops.providers import backend

PAIRS = 28  # four blocks: a copy of the weights for each provider


def cases(scale: Scale) -> list[Case]:
    return [
        replace(case, pairs=case.pairs[:PAIRS], dtype=dtype) for case in scale.steps("merge") for dtype in scale.dtypes
    ]


def build(case: Case, setting: Setting) -> Comparison:
    pairs = Pairs.of(case, setting.device)
    scale = torch.full((len(case.pairs), case.r), 1e-3, device=setting.device)

    def weights() -> list[torch.Tensor]:
        generator = torch.Generator(setting.device).manual_seed(1)
        draw = lambda d_in, d_out: torch.randn(d_out, d_in, generator=generator, device=setting.device)
        return [draw(*shape).to(getattr(torch, case.dtype)) for shape in case.pairs]

    def eager(own):
        for weight, a, b, d in zip(own, pairs.a, pairs.b, scale, strict=True):
            weight.copy_(weight + (b * d) @ a)
        return own

    def in_place(own):
        for weight, a, b, d in zip(own, pairs.a, pairs.b, scale, strict=True):
            weight.addmm_((b * d).to(weight.dtype), a.to(weight.dtype))
        return own

    def ours(own):
        lora_fast.backend.ops("pairs", own[0]).add_low_rank_(own, pairs.a, pairs.b, scale, "nearest", 0)
        return own

    named = lambda own: {str(i): weight for i, weight in enumerate(own)}

    def provider(run, name: str = "auto") -> Provider:
        own, start = weights(), weights()
        prepare = lambda: torch._foreach_copy_(own, start)
        return Provider(lambda: run(own), results=named, prepare=prepare, context=lambda: backend(name))

    def exact() -> dict[str, torch.Tensor]:
        return named(eager([weight.double() for weight in weights()]))

    providers: dict = {"torch": lambda: provider(eager), "addmm_": lambda: provider(in_place)}
    providers["ours"] = lambda: provider(ours, "triton" if setting.triton else "torch")
    own = weights()
    operations = sum(2 * case.r * weight.numel() for weight in own)
    work = Cost(2 * size(*own) + size(*pairs.a, *pairs.b), operations)
    return Comparison(providers, {"forward": work}, exact)
