"""Collects the changes of a model's frozen weights for an adapter's files, and checks and restores them from there."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import torch
from torch import Tensor, nn

from .. import checks
from ..checks import CheckpointError
from ..layers import merge_log, terms
from ..layers.base import AdapterLinear
from ..layers.find import AdapterLayer, adapter_layers, expert_count
from ..layers.hooks import stored_tensor
from ..layers.merge_log import Term, holder
from ..layers.merging import CHANGED
from ..surgery.merge import not_unmergeable, original_weight, weight_owners
from . import io
from .peft_format import PREFIX, Adapter, Change, check_tensor

MIB = 2**20


def collect(model: nn.Module, layers: Mapping[str, AdapterLayer], exact: bool) -> dict[str, Change]:
    """Returns the change of each changed weight, by module name: the terms where they were kept; otherwise, and if
    ``exact``, the weight.

    Args:
        layers: name → LoRALinear or PEFT layer of the adapter that is saved.

    Raises:
        CheckpointError: a changed weight that belongs to none of these layers, is one parameter of many experts, was
            merged by PEFT, is sharded or has no data.
    """
    _check_no_other(model, layers.values(), "changed base weights in the adapter's own layers only")
    changes = {}
    for name, layer in layers.items():
        if not merge_log.is_changed(holder(layer)):
            continue
        _check_one_product(name, layer)
        term = _joined(merge_log.kept_terms(layer), layer.weight)
        if exact or term is None or not _takes_further_ranks(layer):
            changes[name] = Change(io.to_host(f"{name}.weight", _original(name, layer)), term if exact else None)
        elif len(term[1]):  # 0 where no merge added anything
            changes[name] = Change(None, term)
    return changes


def mark_changeable_(model: nn.Module, layers: Mapping[str, AdapterLayer]) -> None:
    """Marks the frozen weights of trained adapters as changed, by no terms yet, so that all checkpoints of a training
    that will change them contain them. The first can then be loaded over the last.

    Args:
        layers: name → layer of the adapter that is saved.

    Raises:
        CheckpointError: a weight whose change could not be saved or not be restored. Nothing is then marked.
    """
    owners = weight_owners(model)
    trained = {name: layer for name, layer in layers.items() if _is_trained(layer)}
    for name, layer in trained.items():
        _check_one_product(name, layer)
        _check_change(name, layer, Change(_original(name, layer), None), owners)
    for layer in trained.values():
        if not merge_log.is_changed(holder(layer)):
            merge_log.mark(layer, [])


def _only_marked(layer: AdapterLayer | nn.Linear) -> bool:
    """Returns whether the layer's weight is marked and nothing was merged into it."""
    return merge_log.kept_terms(layer) == []


def _is_trained(layer: AdapterLayer) -> bool:
    """Returns whether the layer has a factor that is trained and a matrix."""
    return any(p.requires_grad and p.dim() == 2 for name, p in layer.named_parameters() if "lora_" in name)


def _check_one_product(name: str, layer: AdapterLayer) -> None:
    """Raises CheckpointError for a layer of many experts, whose changed weight no adapter's file can hold."""
    if expert_count(layer) > 1:
        expected = "base weights that an adapter's files can hold (else merge_and_unload, or the whole state_dict)"
        got = f"{name}: ScaLoRA merges into the parameter of {layer.num_experts} experts, {layer.parameter_name}"
        raise CheckpointError("model", expected, got)


def check(
    model: nn.Module,
    layers: Mapping[str, AdapterLayer | nn.Linear],
    adapter: Adapter,
    restored: Collection[str],
) -> None:
    """Raises CheckpointError unless the adapter was trained on the model's frozen weights, or its changes can be put
    into them.

    Args:
        layers: name → the adapter's layer in the model, or the nn.Linear that it will replace.
        restored: names of modules whose frozen weight in the file will be copied into the model.
    """
    owners = weight_owners(model)
    for name, layer in layers.items():
        if name in adapter.changes:
            _check_change(name, layer, adapter.changes[name], owners)
        saved = adapter.base_weights.get(name)
        if saved is not None and name not in restored:
            weight = io.check_destination(f"{name}.weight", stored_tensor(holder(layer), "weight")).detach()
            if not torch.equal(saved, weight.to("cpu", saved.dtype)):
                expected, got = "the model's own frozen weight", "other values or another shape"
                raise CheckpointError(f"key {PREFIX}{name}.base_layer.weight", expected, got)
    _check_no_other(model, [layers[name] for name in adapter.changes], "the base that the adapter was trained on")


@torch.no_grad()
def restore_(layer: AdapterLayer, change: Change) -> None:
    """Puts a checked change into the layer's frozen weight, and records it in the merge log."""
    weight, term = layer.weight, change.term
    if change.weight is not None:
        weight.copy_(change.weight)
    elif term is not None:
        b, a = (factor.to(weight.device) for factor in term)
        weight.copy_(terms.merged_weight(weight, [terms.Term(a, b, 1.0)]))
    # Copies, because the file's tensors are mapped from the disk.
    merge_log.mark(layer, None if term is None else [(term[0].clone(), term[1].clone())])


def note(changes: dict[str, Change], action: str) -> str:
    """Returns a sentence on the changes for the report, empty if there are none. ``action``: "saved", "restored"."""
    weights = [change.weight for change in changes.values() if change.weight is not None]
    ranks = [len(change.term[1]) for change in changes.values() if change.weight is None and change.term]
    parts = []
    if weights:
        parts.append(f"{len(weights)} weights {action} whole, {sum(w.nbytes for w in weights) / MIB:.1f} MiB")
    if ranks:
        parts.append(f"{len(ranks)} {action} as terms, rank up to {max(ranks)}")
    return f"The base has changed: {'; '.join(parts)}" if parts else ""


def _check_no_other(model: nn.Module, layers: Iterable[nn.Module], expected: str) -> None:
    """Raises CheckpointError if the frozen weight of a layer that is not among ``layers`` has changed."""
    holders = {id(holder(layer)) for layer in layers}
    holders |= {id(holder(layer)) for layer in adapter_layers(model).values() if _only_marked(layer)}
    for name, module in model.named_modules():
        if merge_log.is_changed(module) and id(module) not in holders:
            raise CheckpointError("model", expected, f"{name}.weight, changed by merges during training")


def _joined(terms: list[Term] | None, weight: Tensor) -> Term | None:
    """Concatenates all terms into one, b (d_out, k) and a (k, d_in), without those whose b is 0."""
    if terms is None:
        return None
    terms = [(b, a) for b, a in terms if b.any()]
    if not terms:
        return weight.new_empty((weight.shape[0], 0)), weight.new_empty((0, weight.shape[1]))
    return torch.cat([b for b, _ in terms], 1), torch.cat([a for _, a in terms])


def _takes_further_ranks(layer: AdapterLayer) -> bool:
    """Returns whether further ranks of the adapter have the effect of a change of the weight; a variant's, as DoRA's,
    do not, nor do those of an adapter with scale 0."""
    if isinstance(layer, AdapterLinear):
        return layer.scaling != 0 and not layer.scales_weight
    return all(name not in layer.lora_variant and layer.scaling[name] != 0 for name in layer.active_adapters)


def _original(name: str, layer: AdapterLayer) -> Tensor:
    weight = original_weight(layer)
    if weight is None:
        raise CheckpointError("model", "unmerged layers", f"{name} {not_unmergeable(layer) or CHANGED}")
    return weight


def unmerged(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors with the originals of those that adapters are merged into, which also other modules may hold.

    Raises:
        CheckpointError: one that PEFT has merged an adapter into, so that its original is not known.
    """
    merged = {name: layer for name, layer in adapter_layers(model).items() if layer.merged}
    if not merged:
        return dict(tensors)
    layers = {layer.weight.data_ptr(): (name, layer) for name, layer in merged.items() if hasattr(layer, "weight")}
    places = {key: layers.get(tensor.data_ptr()) for key, tensor in tensors.items()}
    return {key: tensors[key] if place is None else _original(*place) for key, place in places.items()}


def _check_change(name: str, layer: AdapterLayer | nn.Linear, change: Change, owners: dict[int, list[str]]) -> None:
    weight, shared = layer.weight, owners.get(id(layer.weight), [])
    if type(weight) not in checks.PLAIN or weight.is_meta or weight.dtype not in checks.FLOATS:
        got = f"{type(weight).__name__} of {weight.dtype} on {weight.device}"
        raise CheckpointError(f"{name}.weight", "a plain floating-point weight, for its change to be restored", got)
    if len(shared) > 1:
        expected = "a weight of its own, for its change to be restored"
        raise CheckpointError(f"{name}.weight", expected, f"one weight held by {' and '.join(shared)}")
    if change.weight is not None:
        check_tensor(f"{name}.base_layer", change.weight, tuple(weight.shape), weight.dtype)
    elif merge_log.is_changed(holder(layer)) and not _only_marked(layer):
        expected = "the unchanged weight, for terms to be added to it"
        raise CheckpointError(f"{name}.weight", expected, "one that training, or another load, has changed")
