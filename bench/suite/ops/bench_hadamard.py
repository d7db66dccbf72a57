"""ScaLoRA's Hadamard system, 2r×2r with x ≥ 0, of every adapter pair, from their Grams."""

import torch

from lora_fast.kernels.limits import LARGEST_SCALORA_RANK
from lora_fast.ops.reference import scalora_solution
from lora_fast.ops.reference.pairs import Grams, grams
from suite.cases import Case, Scale
from suite.comparison import Comparison, Cost, Provider, Setting, size
from suite.ops.pair_operands import Pairs


def cases(scale: Scale) -> list[Case]:
    return [case for case in scale.steps("hadamard") if case.r <= LARGEST_SCALORA_RANK]


def of_one_gradient(pairs: Pairs, r: int) -> Pairs:
    """Replaces the gradients of a and b by those that follow from one gradient of the weight, here of rank 4r. Of two
    that do not belong together the system is indefinite, and has no solution to compare with."""
    generator = torch.Generator(pairs.a[0].device).manual_seed(1)
    draw = lambda m, n: torch.randn(m, n, generator=generator, device=pairs.a[0].device)
    for i, (a, b) in enumerate(zip(pairs.a, pairs.b, strict=True)):
        left, right = draw(len(b), 4 * r), draw(4 * r, a.shape[1]) / 1000
        pairs.da[i], pairs.db[i] = (b.mT @ left) @ right, left @ (right @ a.mT)
    return pairs


def build(case: Case, setting: Setting) -> Comparison:
    pairs = of_one_gradient(Pairs.of(case, setting.device), case.r)
    of_pair = [grams(*(t[None] for t in members)) for members in zip(*pairs.lists, strict=True)]
    stacked = Grams(*(torch.cat(same).contiguous() for same in zip(*of_pair, strict=True)))
    solve = lambda some: scalora_solution.scalora_solve(*some, "nnls")[0]

    def ours() -> Provider:
        if not setting.triton:
            return Provider(lambda: solve(stacked), results=lambda x: {"x": x})
        from lora_fast.kernels.pairs import scalora_system

        return Provider(lambda: scalora_system.scalora_solve(*stacked, "nnls")[0], results=lambda x: {"x": x})

    if setting.triton:  # a loop over pairs takes seconds there
        name, eager = "torch, batched", lambda: solve(stacked)
    else:
        name, eager = "torch, loop", lambda: torch.cat([solve(one) for one in of_pair])
    n, side = len(case.pairs), 2 * case.r
    work = Cost(size(*stacked) + 4 * n * side, n * side**3 // 3)
    exact = lambda: {"x": solve(Grams(*(gram.double() for gram in stacked)))}
    providers = {name: lambda: Provider(eager, results=lambda x: {"x": x}), "ours": ours}
    return Comparison(providers, {"forward": work}, exact)
