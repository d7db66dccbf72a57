"""Finds layers whose weight a model reads without calling the layer, so that an adapter on them would have no effect.

Fused kernels take weights as arguments: Mamba's CUDA kernels ``self.out_proj.weight``, a fused linear cross-entropy
``self.lm_head.weight``, ``nn.TransformerEncoderLayer`` those of its feed-forward. The reads are found in the source of
the methods of each module's class, a patched ``forward`` included. Reads of a dtype, device or shape do not count, nor
do reads under an ``if`` whose condition is false for the module, as BLOOM's ``if self.pretraining_tp > 1``.
"""

from __future__ import annotations

import functools
import re
from itertools import chain
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

from torch import nn

from .source_reader import DEPTH, modules_read
from .source_syntax import WEIGHT
from .source_values import PARAMETERS, global_of, inside, of_class, python_function

LAYERS = "peft.", f"{__name__.partition('.')[0]}."  # packages whose modules are layers with adapters
READ_NAMES = {WEIGHT, "_parameters", *PARAMETERS}  # one of them is in the code of every function that reads a weight
NOT_IN_FORWARD = re.compile(
    r"__(?!call__)\w+__|_?(init|reset|resize|tie|load|save|prune|convert)|set_|get_|from_|extra_|fuse_projections"
)


def weight_reads(model: nn.Module) -> dict[nn.Module, str]:
    """Returns module → which method reads its weight without calling it, for the descendants of all modules."""
    reasons: dict[nn.Module, str] = {}
    methods: dict[type[nn.Module], list[FunctionType]] = {}
    for module in model.modules():
        kind: Any = type(module)
        if kind not in methods:
            methods[kind] = _methods_that_read(kind)
        replaced = python_function(module.__dict__.get("forward"))
        functions = [*methods[kind], *([replaced] if replaced and _may_read(replaced, kind) else [])]
        # A module without children reads no weight but its own, as every layer does.
        for function in functions if module._modules else []:
            for layer in modules_read(function, module):
                reasons.setdefault(layer, f"{kind.__name__}.{function.__name__} reads its weight without calling it")
    return reasons


def _methods_that_read(kind: Any) -> list[FunctionType]:
    """Returns the methods of a class that may read a weight in a forward pass."""
    methods: dict[str, Any] = {}
    for base in reversed(kind.__mro__):
        # PEFT's classes and ours read weights to merge and to initialise; their forwards are those of layers.
        if issubclass(base, nn.Module) and base is not nn.Module and not base.__module__.startswith(LAYERS):
            methods |= vars(base)
    wanted = [python_function(value) for name, value in methods.items() if not NOT_IN_FORWARD.match(name)]
    return [function for function in wanted if function is not None and _may_read(function, kind)]


@functools.lru_cache(maxsize=16384)
def _may_read(function: FunctionType, kind: Any, depth: int = 1) -> bool:
    """Returns whether the function, or one that it calls, has in its code what every read of a weight has. It spares
    most functions the parsing of their source."""
    code = _names(function.__code__)
    if WEIGHT in code or (depth == 1 and code & READ_NAMES):
        return True
    if depth == DEPTH:
        return False
    names = [name for name in code if name.startswith("get_") or not NOT_IN_FORWARD.match(name)]
    referred = {id(value): value for name in names for value in (of_class(kind, name), global_of(function, name))}
    holders = [value for value in referred.values() if isinstance(value, (ModuleType, type))]
    for holder in holders:  # of functions, as in ``module.function``
        if not holder.__name__.startswith("torch"):
            inner = {id(value): value for name, value in vars(holder).items() if name in names}
            holders += [v for key, v in inner.items() if key not in referred and isinstance(v, (ModuleType, type))]
            referred |= inner
    functions = [inside(value) for value in referred.values()]
    called = {python_function(f) for f in functions if isinstance(f, (FunctionType, MethodType))}
    return any(f is not None and f is not function and _may_read(f, kind, depth + 1) for f in called)


@functools.lru_cache(maxsize=16384)
def _names(code: CodeType) -> frozenset[str]:
    """Returns the names and the strings in a function's code."""
    inner = [_names(part) for part in code.co_consts if isinstance(part, CodeType)]
    strings = [part for part in code.co_consts if isinstance(part, str)]
    return frozenset(chain(code.co_names, code.co_freevars, strings, *inner))
