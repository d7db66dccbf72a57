"""What an optimizer trains of a model."""

from __future__ import annotations

from torch import Tensor, nn

from .. import checks
from ..layers.base import AdapterLinear
from ..layers.find import AdapterLayer, adapter_layers
from .pairs import Pair, find_pairs

Named = tuple[str, Tensor]


def trained_parameters(model: nn.Module, pairing: bool) -> tuple[list[Pair], list[Named]]:
    """Returns the pairs of a model and its other trained parameters with their names.

    Args:
        model: the model.
        pairing: whether the optimizer has methods. Otherwise factors that a wrapper has flattened or sharded are
            trained as other parameters are.

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
    if not pairing:
        pairs = [pair for pair in pairs if pair.is_whole]
    # Compared by id, because == of tensors compares their entries.
    factors = {id(factor) for pair in pairs for factor in (pair.a, pair.b)}
    return pairs, [(name, p) for name, p in model.named_parameters() if p.requires_grad and id(p) not in factors]


def _is_trained(layer: AdapterLayer) -> bool:
    """Returns whether a layer has a trained parameter of an active adapter. PEFT's layers, of whatever tuner, have one
    dictionary of modules or parameters for each name in ``adapter_layer_names``, with the adapters' names as keys."""
    if isinstance(layer, AdapterLinear):
        return any(getattr(layer, name).requires_grad for name in layer.TRAINABLE)
    holders = [getattr(layer, name, None) for name in layer.adapter_layer_names]
    named = [entry for holder in holders if isinstance(holder, nn.Module) for entry in holder.named_parameters()]
    return any(p.requires_grad and name.split(".")[0] in layer.active_adapters for name, p in named)
