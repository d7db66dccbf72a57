"""The five r×r Grams of every adapter pair: a aᵀ, bᵀb, da daᵀ, dbᵀdb, da aᵀ."""

import torch
from torch import Tensor

from lora_fast.measure.ceilings import Cost
from lora_fast.ops.reference import pairs as reference
from suite.cases import Case, Scale
from suite.comparison import Comparison, Provider, Setting, size
from suite.ops.pair_operands import Pairs, by_shape


def cases(scale: Scale) -> list[Case]:
    return scale.steps("gram")


def looped(a: list, b: list, da: list, db: list) -> list[tuple[Tensor, ...]]:
    return [(x @ x.T, y.T @ y, dx @ dx.T, dy.T @ dy, dx @ x.T) for x, y, dx, dy in zip(a, b, da, db, strict=True)]


def named(grams_of_pairs: list) -> dict[str, Tensor]:
    return {f"{i} {k}": gram for i, grams in enumerate(grams_of_pairs) for k, gram in enumerate(grams)}


def build(case: Case, setting: Setting) -> Comparison:
    pairs = Pairs.of(case, setting.device)

    def loop() -> Provider:
        return Provider(lambda: looped(*pairs.lists), results=named)

    def kernel() -> Provider:
        from lora_fast.kernels.pairs import gram

        def results(grams):
            return named(list(zip(*grams, strict=True)))

        return Provider(lambda: gram.gram(*pairs.lists, gram.Grams._fields), results=results)

    def stacked() -> Provider:
        """Computes the Grams as the torch backend does, which keeps factors of one shape in a stack."""
        groups = by_shape(case.pairs).values()
        stacks = [[torch.stack([tensors[i] for i in indices]) for tensors in pairs.lists] for indices in groups]

        def results(grams_of_stacks):
            grams_by_pair = {}
            for indices, grams in zip(groups, grams_of_stacks, strict=True):
                grams_by_pair |= dict(zip(indices, zip(*grams, strict=True), strict=True))
            return named([grams_by_pair[i] for i in range(len(case.pairs))])

        return Provider(lambda: [reference.grams(*stack) for stack in stacks], results=results)

    def exact():
        return named(looped(*([t.double() for t in tensors] for tensors in pairs.lists)))

    grams_bytes = 5 * 4 * case.r**2 * len(case.pairs)
    operations = sum(5 * case.r * t.numel() for t in pairs.a + pairs.b)
    cost = Cost(size(*(t for tensors in pairs.lists for t in tensors)) + grams_bytes, operations)
    return Comparison({"torch, loop": loop, "ours": kernel if setting.triton else stacked}, {"forward": cost}, exact)
