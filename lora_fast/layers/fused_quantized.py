"""PEFT's LoRA layers over quantised weights with the fused forward: a class for each of PEFT's that a family of formats
names (``QuantizedWeight.PEFT_LAYERS``). PEFT's own merge and unmerge stay: they quantise the sum again."""

from __future__ import annotations

import sys
from functools import cache
from importlib import import_module
from typing import Any

from ..quantized import FORMATS
from .fused_peft import FusedForward


@cache
def fused_class_of(peft_class: Any) -> type[FusedForward] | None:
    """Returns the fused class for a class of PEFT's layers over quantised weights, None for other classes. Its name is
    an attribute of this module, so that layers can be pickled."""
    name = f"{peft_class.__module__}.{peft_class.__qualname__}"
    if not any(name in kind.PEFT_LAYERS for kind in FORMATS):
        return None
    attributes = {"PEFT_CLASS": peft_class, "__module__": __name__, "__doc__": f"A ``{name}`` with the fused forward."}
    fused = type(f"Fused{peft_class.__name__}", (FusedForward, peft_class), attributes)
    setattr(sys.modules[__name__], fused.__name__, fused)
    return fused


def __getattr__(name: str) -> type:
    """Returns the fused class of this name, which a pickle may need before a layer has been fused here."""
    for peft_name in (layer for kind in FORMATS for layer in kind.PEFT_LAYERS):
        module, _, peft_class = peft_name.rpartition(".")
        if name == f"Fused{peft_class}" and (fused := fused_class_of(getattr(import_module(module), peft_class))):
            return fused
    raise AttributeError(name)
