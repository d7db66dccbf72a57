"""ScaLoRA's Hadamard system, 2r×2r with x ≥ 0, of every adapter pair, from their Grams."""

import torch
from measure import Comparison, Provider, Setting, Work, size
from pairs import Pairs
from shapes import Case, Scale

from lora_fast import reference_scalora
from lora_fast.reference_step import Grams, grams

LARGEST = 128  # rank


def cases(scale: Scale) -> list[Case]:
    return [case for case in scale.steps("hadamard") if case.r <= LARGEST]


def build(case: Case, setting: Setting) -> Comparison:
    pairs = Pairs.of(case, setting.device)
    of_pair = [grams(*(t[None] for t in members)) for members in zip(*pairs.lists, strict=True)]
    stacked = Grams(*(torch.cat(same).contiguous() for same in zip(*of_pair, strict=True)))
    solve = lambda some: reference_scalora.scalora_solve(*some, "nnls")[0]

    def ours() -> Provider:
        if not setting.triton:
            return Provider(lambda: solve(stacked), results=lambda x: {"x": x})
        from lora_fast.kernels import hadamard

        return Provider(lambda: hadamard.scalora_solve(*stacked, "nnls")[0], results=lambda x: {"x": x})

    if setting.triton:  # a loop over pairs takes seconds there
        name, eager = "torch, batched", lambda: solve(stacked)
    else:
        name, eager = "torch, loop", lambda: torch.cat([solve(one) for one in of_pair])
    n, side = len(case.pairs), 2 * case.r
    work = Work(size(*stacked) + 4 * n * side, n * side**3 // 3)
    exact = lambda: {"x": solve(Grams(*(gram.double() for gram in stacked)))}
    providers = {name: lambda: Provider(eager, results=lambda x: {"x": x}), "ours": ours}
    return Comparison(providers, {"forward": work}, exact)
