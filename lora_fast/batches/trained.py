"""What an optimizer trains of a model."""

from __future__ import annotations

import warnings

from torch import Tensor, nn

from .. import checks
from ..layers.base import AdapterLinear
from ..layers.find import AdapterLayer, adapter_layers, bare_name
from ..surgery.weight_reads import weight_reads
from .pairs import Pair, find_pairs

Named = tuple[str, Tensor]


def trained_parameters(model: nn.Module, as_pairs: bool) -> tuple[list[Pair], list[Named], list[Named]]:
    """Returns the pairs of a model, their trained factors with their names, and its other trained parameters with
    theirs. Order and names are the same for a model in a wrapper, so that an optimizer's state can be loaded without
    it.

    Args:
        model: the model.
        as_pairs: whether the optimizer has methods. Otherwise there are no pairs where a wrapper has flattened or
            sharded a factor.

    Raises:
        ArgumentError: no layer of the model has an active adapter that is trained. The model's own weights are not
            trained instead.
    """
    pairs = find_pairs(model)
    if not pairs:
        layers = adapter_layers(model)
        if not any(_is_trained(layer) for layer in layers.values()):
            expected = (
                "a model with trained adapters, which lf.inject_, peft.get_peft_model or PeftModel.from_pretrained(…, "
                "is_trainable=True) give it (for a model without adapters use torch.optim.AdamW)"
            )
            without = f"a {type(model).__name__} without adapter layers"
            got = f"adapter layers ({len(layers)}) whose active adapters are all frozen" if layers else without
            raise checks.ArgumentError("model", expected, got)
    # Compared by id, because == of tensors compares their entries.
    trained: dict[int, Named] = {id(p): (bare_name(name), p) for name, p in model.named_parameters() if p.requires_grad}
    in_pairs = {id(p) for pair in pairs for _, p in pair.named_factors}
    others = [named for key, named in trained.items() if key not in in_pairs]
    factors = [entry for pair in pairs for entry in pair.trained_factors]
    if as_pairs or all(pair.is_whole for pair in pairs):
        return pairs, factors, others
    return [], [(name, p) for name, p in factors if id(p) in trained], others


def warn_of_adapters_without_effect(model: nn.Module) -> None:
    """Warns of trained adapters whose layer's weight the model reads without calling the layer. ``inject_`` and
    ``fuse_`` leave such layers, but a trainer may have replaced a forward since then (``use_liger_kernel``)."""
    reads = weight_reads(model)
    layers = {name: layer for name, layer in adapter_layers(model).items() if layer in reads and _is_trained(layer)}
    for name, layer in layers.items():
        warnings.warn(f"the adapter of {name} may have no effect: {reads[layer]}", stacklevel=3)


def _is_trained(layer: AdapterLayer) -> bool:
    """Returns whether a layer has a trained parameter of an active adapter. PEFT's layers, of whatever tuner, have one
    dictionary of modules or parameters for each name in ``adapter_layer_names``, with the adapters' names as keys."""
    if isinstance(layer, AdapterLinear):
        return any(getattr(layer, name).requires_grad for name in layer.TRAINABLE)
    holders = [getattr(layer, name, None) for name in layer.adapter_layer_names]
    named = [entry for holder in holders if isinstance(holder, nn.Module) for entry in holder.named_parameters()]
    return any(p.requires_grad and name.split(".")[0] in layer.active_adapters for name, p in named)
