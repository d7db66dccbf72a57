"""Frozen weights that training has changed, between a model and an adapter's files."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from .. import checks
from ..checks import CheckpointError
from ..layers import merge_log
from ..layers.base import merged_weight
from ..layers.find import expert_count
from ..layers.merge_log import Term, holder
from ..surgery.merge import original_weight, weight_owners
from . import io
from .peft_format import PREFIX, Adapter, Change, check_tensor

MIB = 2**20


def collect(model: nn.Module, layers: dict[str, nn.Module], exact: bool) -> dict[str, Change]:
    """What the files have to say of the changed weights: the terms where they were kept, else, or if ``exact``, the
    weight. ``layers``: name → LoRALinear or PEFT layer, those of the adapter that is saved.

    Raises:
        CheckpointError: a changed weight in none of these layers, one parameter of many experts, merged by PEFT,
            sharded or without data.
    """
    _check_no_other(model, layers.values(), "changed base weights in the adapter's own layers only")
    changes = {}
    for name, layer in layers.items():
        if not merge_log.is_changed(holder(layer)):
            continue
        if expert_count(layer) > 1:
            expected = "base weights that an adapter's files can hold (else merge_and_unload, or the whole state_dict)"
            got = f"{name}: ScaLoRA merged into the parameter of {layer.num_experts} experts, {layer.parameter_name}"
            raise CheckpointError("model", expected, got)
        term = _joined(merge_log.kept_terms(layer), layer.weight)
        if exact or term is None or not _takes_ranks(layer):
            changes[name] = Change(_weight(name, layer), term if exact else None)
        elif len(term[1]):
            changes[name] = Change(None, term)
    return changes


def check(model: nn.Module, layers: dict[str, nn.Module], adapter: Adapter) -> None:
    """Raises CheckpointError unless the adapter fits the model's base, or its changes can be put into it. ``layers``:
    the adapter's, or the plain linear layers that they will take the place of."""
    owners = weight_owners(model)
    for name, layer in layers.items():
        if name in adapter.changes:
            _check_change(name, layer, adapter.changes[name], owners)
        saved = adapter.base_weights.get(name)
        if saved is not None and not torch.equal(saved, layer.weight.detach().to("cpu", saved.dtype)):
            expected = "the model's own frozen weight"
            raise CheckpointError(f"key {PREFIX}{name}.base_layer.weight", expected, "other values or another shape")
    _check_no_other(model, [layers[name] for name in adapter.changes], "the base that the adapter was trained on")


@torch.no_grad()
def restore_(layers: dict[str, nn.Module], adapter: Adapter) -> None:
    """Put the changes, checked, into the weights, and note what is known of them."""
    for name, change in adapter.changes.items():
        weight, term = layers[name].weight, change.term
        if change.weight is not None:
            weight.copy_(change.weight)
        else:
            b, a = (factor.to(weight.device) for factor in term)
            weight.copy_(merged_weight(weight, [(a, b, 1.0)]))
        merge_log.mark(layers[name], None if term is None else [tuple(factor.clone() for factor in term)])


def note(changes: dict[str, Change], done: str) -> str:
    """A sentence for the report; nothing where nothing changed."""
    weights = [change.weight for change in changes.values() if change.weight is not None]
    ranks = [len(change.term[1]) for change in changes.values() if change.weight is None]
    parts = []
    if weights:
        parts.append(f"{len(weights)} weights {done} whole, {sum(w.nbytes for w in weights) / MIB:.1f} MiB")
    if ranks:
        parts.append(f"{len(ranks)} {done} as terms, rank up to {max(ranks)}")
    return f"The base has changed: {'; '.join(parts)}" if parts else ""


def _check_no_other(model: nn.Module, layers: Iterable[nn.Module], expected: str) -> None:
    """Raises CheckpointError if the weight of any layer but these has changed."""
    holders = {id(holder(layer)) for layer in layers}
    for name, module in model.named_modules():
        if merge_log.is_changed(module) and id(module) not in holders:
            raise CheckpointError("model", expected, f"{name}.weight, changed by merges during training")


def _joined(terms: list[Term] | None, weight: Tensor) -> Term | None:
    """All terms as one, b (d_out, k) and a (k, d_in), without those that added nothing."""
    if terms is None:
        return None
    terms = [(b, a) for b, a in terms if b.any()]
    if not terms:
        return torch.empty(weight.shape[0], 0), torch.empty(0, weight.shape[1])
    return torch.cat([b for b, _ in terms], 1), torch.cat([a for _, a in terms])


def _takes_ranks(layer: nn.Module) -> bool:
    """Whether further ranks of its adapter are the same as a change of its weight."""
    return not any(name in layer.lora_variant for name in getattr(layer, "active_adapters", ()))


def _weight(name: str, layer: nn.Module) -> Tensor:
    weight = original_weight(layer)
    if weight is None:
        raise CheckpointError("model", "unmerged layers", f"{name} merged by PEFT, which keeps no original")
    return io.to_host(f"{name}.weight", weight)


def _check_change(name: str, layer: nn.Module, change: Change, owners: dict[int, list[str]]) -> None:
    weight, shared = layer.weight, owners.get(id(layer.weight), [])
    if type(weight) not in (Tensor, nn.Parameter) or weight.is_meta or weight.dtype not in checks.FLOATS:
        got = f"{type(weight).__name__} of {weight.dtype} on {weight.device}"
        raise CheckpointError(f"{name}.weight", "a plain floating-point weight, for its change to be restored", got)
    if len(shared) > 1:
        expected = "a weight of its own, for its change to be restored"
        raise CheckpointError(f"{name}.weight", expected, f"one weight held by {' and '.join(shared)}")
    if change.weight is not None:
        check_tensor(f"{name}.base_layer", change.weight, tuple(weight.shape), weight.dtype)
    elif merge_log.is_changed(holder(layer)):
        expected = "the unchanged weight, for terms to be added to it"
        raise CheckpointError(f"{name}.weight", expected, "one that training, or another load, has changed")
