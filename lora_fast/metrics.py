"""Statistics of a model's adapters. They are computed from r×r Grams, without forming any product s b a."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from . import checks
from .batches import pairs
from .batches.pairs import Pair
from .kernels.grouping import group_by
from .layers.nb_lora import NBLoRALinear, factors_of
from .layers.sing_lora import SingLoRALinear
from .ops.pairs import grams

__all__ = ["AdapterStats", "BoundStats", "adapter_stats", "bound_stats", "not_finite"]

SIGNIFICANT = 0.005  # larger singular values count for the rank


@dataclass(frozen=True)
class AdapterStats:
    """The statistics of an adapter, or of one expert of it, with ΔW = s b a and ρ = r / d_out.

    Attributes:
        norm_a, norm_b: Frobenius norms of a and b. rms_ratio: root mean square of a's entries over that of b's.
        frobenius, spectral, nuclear: norms of ΔW.
        rank: number of singular values of ΔW above 0.005. erank: stable rank of ΔW, ‖ΔW‖_F² / ‖ΔW‖₂².
        unbalanced: ‖a aᵀ − bᵀb‖_F, which BaLoRA makes 0. imbalance: ‖a aᵀ − ρ bᵀb‖_F, which iLoRA reduces.
        conditioning: (σ₁(a)² + σ₁(b)²) / min(σ_r(a)², σ_r(b)²).
    """

    norm_a: float
    norm_b: float
    rms_ratio: float
    frobenius: float
    spectral: float
    nuclear: float
    rank: int
    erank: float
    unbalanced: float
    imbalance: float
    conditioning: float


@torch.no_grad()
def adapter_stats(model: nn.Module) -> dict[str, AdapterStats]:
    """Returns the statistics of every trained adapter, by the name of its layer (and PEFT's name of the adapter). Where
    one parameter holds many experts (PEFT's ``target_parameters``), every expert has an entry, whose name ends in its
    number: "….experts.default.0". The figures of a DoRA adapter are those of its product s b a, without its magnitudes.
    Adapters without a matrix product s b a (of embeddings, convolutions and other tuners than LoRA) have no entry.

    The computation is batched over adapters of equal shape, with one copy from the device for all of them. A singular
    value of ΔW below about 1e-3 of the largest has the rounding error of float32 Grams. Factors that are not finite
    give NaN in every field.

    Raises:
        ArgumentError: ``model`` is not a module, or adapters without data (on the meta device) or in shards.
    """
    adapters = pairs.find_pairs(model) + _derived_pairs(model)
    pairs.check(adapters, set(), whole=True)
    if on_meta := next((pair.name for pair in adapters if pair.a.is_meta), None):
        raise checks.ArgumentError("model", "adapters with data", f"{on_meta} on the meta device")
    groups = group_by(adapters, lambda pair: (pair.a.shape, pair.b.shape, pair.experts, pair.a.dtype, pair.a.device))
    if not groups:
        return {}
    device = adapters[0].a.device
    tables = [_measure(members).to(device) for members in groups.values()]
    rows = torch.cat(tables).tolist()  # the only copy from the device
    names = [name for members in groups.values() for pair in members for name in pair.product_names]
    order = {name: i for i, name in enumerate(name for pair in adapters for name in pair.product_names)}
    # The rank, field 6, is an integer unless it is NaN.
    ranked = [[*row[:6], row[6] if math.isnan(row[6]) else int(row[6]), *row[7:]] for row in rows]
    stats = {name: AdapterStats(*row) for name, row in zip(names, ranked, strict=True)}
    return dict(sorted(stats.items(), key=lambda item: order[item[0]]))


def not_finite(stats: dict[str, AdapterStats]) -> list[str]:
    """Returns the names of the adapters whose factors are not finite.

    Args:
        stats: the result of ``adapter_stats``.

    Raises:
        ArgumentError: another value.
    """
    return [name for name, adapter in _checked(stats).items() if math.isnan(adapter.norm_a)]


@dataclass(frozen=True)
class BoundStats:
    """The bound of a norm-bounded layer: the norm's name, its bound, its value for ΔW, and the value over the bound."""

    norm: str
    bound: float
    value: float
    used: float


def bound_stats(model: nn.Module, stats: dict[str, AdapterStats] | None = None) -> dict[str, BoundStats]:
    """Returns how much of its bound each NBLoRALinear uses, by the layer's name.

    Args:
        model: a model with NBLoRALinear layers.
        stats: the current result of ``adapter_stats``, if the caller has it. It saves a copy from the device.

    Raises:
        ArgumentError: ``model`` is not a module, or ``stats`` no such result.
    """
    checks.module(model)
    stats = adapter_stats(model) if stats is None else _checked(stats)
    bounds = {}
    for name, layer in model.named_modules():
        if isinstance(layer, NBLoRALinear) and name in stats:
            value = getattr(stats[name], layer.norm)
            bounds[name] = BoundStats(layer.norm, layer.bound, value, value / layer.bound)
    return bounds


def _checked(stats: dict[str, AdapterStats]) -> dict[str, AdapterStats]:
    if not isinstance(stats, dict) or not all(isinstance(adapter, AdapterStats) for adapter in stats.values()):
        raise checks.ArgumentError("stats", "the result of lf.metrics.adapter_stats", checks.shown(stats))
    return stats


def _derived_pairs(model: nn.Module) -> list[Pair]:
    """Returns pairs of the factors that NBLoRALinear and SingLoRALinear compute from other parameters."""
    names = {layer: name for name, layer in model.named_modules()}
    bounded = [Pair(names[layer], a, b) for layer, (a, b) in factors_of(model)]
    single = [layer for layer in names if isinstance(layer, SingLoRALinear)]
    return bounded + [Pair(names[layer], layer.lora_A, layer.lora_B, layer.scaling) for layer in single]


def _measure(members: list[Pair]) -> Tensor:
    """Returns the fields of AdapterStats for all products of pairs of one shape: (L, 11) in float64."""
    a, b = torch.cat([pair.split_a(pair.a) for pair in members]), torch.cat([pair.split_b(pair.b) for pair in members])
    ka, kb = (gram.double() for gram in grams(a, b)[:2])
    finite = (ka.isfinite() & kb.isfinite()).all(-1).all(-1)
    ka, kb = (gram.where(finite[:, None, None], 0.0) for gram in (ka, kb))  # eigh raises on NaN
    scales = [abs(pair.scaling) for pair in members for _ in range(pair.experts)]
    scaling = torch.tensor(scales, dtype=torch.float64, device=ka.device)
    eigen_a, eigen_b = (torch.linalg.eigvalsh(k).clamp(min=0) for k in (ka, kb))
    values, q = torch.linalg.eigh(ka)
    root = q * values.clamp(min=0).sqrt()[:, None, :]
    # The singular values of b a are the square roots of the eigenvalues of Ka^½ᵀ Kb Ka^½, for any root of Ka.
    sigma = scaling[:, None] * torch.linalg.eigvalsh(root.mT @ kb @ root).clamp(min=0).sqrt()
    size_a, size_b = eigen_a.sum(-1), eigen_b.sum(-1)
    largest, frobenius = sigma[:, -1], sigma.square().sum(-1).sqrt()
    smallest = torch.minimum(eigen_a[:, 0], eigen_b[:, 0])
    rho = b.shape[2] / b.shape[1]
    fields = [
        size_a.sqrt(),
        size_b.sqrt(),
        ((size_a / a[0].numel()) / (size_b / b[0].numel())).sqrt(),
        frobenius,
        largest,
        sigma.sum(-1),
        (sigma > SIGNIFICANT).sum(-1).double(),
        torch.where(largest > 0, (frobenius / largest).square(), 0.0),
        torch.linalg.matrix_norm(ka - kb),
        torch.linalg.matrix_norm(ka - rho * kb),
        (eigen_a[:, -1] + eigen_b[:, -1]) / smallest,
    ]
    return torch.stack(fields, -1).where(finite[:, None], torch.nan)
