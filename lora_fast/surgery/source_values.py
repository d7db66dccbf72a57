"""What an expression in the source of a model's methods may be, and what attributes, indices and iteration make of it.

A value is a tuple of the objects that an expression may be: modules, functions, classes, constants, and the classes of
this file. It is empty where the source does not tell. No code of the model runs.
"""

from __future__ import annotations

import builtins
import contextlib
import functools
import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

from torch import nn

Value = tuple[Any, ...]
CALLED = (FunctionType, BuiltinFunctionType, MethodType, type)
PARAMETERS = ("parameters", "named_parameters", "state_dict")  # methods that return a module's own tensors


@dataclass(frozen=True)
class Row:
    """A tuple or list with known elements."""

    elements: tuple[Value, ...]


@dataclass(frozen=True)
class Many:
    """An iterable of unknown length, each of whose elements is one of the value."""

    element: Value


@dataclass(frozen=True)
class Tensors:
    """The parameters of a module, by name or in order."""

    module: nn.Module


@dataclass(frozen=True)
class Getter:
    """A property of an object, of which a call of ``method`` returns the value."""

    method: MethodType


def union(values: Iterable[Value]) -> Value:
    """Returns what an expression may be that is one of several."""
    return tuple(dict.fromkeys(chain.from_iterable(values)))


def each(value: Value) -> Value:
    """Returns what the elements of an iterable may be."""
    return union(_elements(item) for item in value)


def _elements(item: Any) -> Value:
    if isinstance(item, nn.ModuleDict):
        return tuple(item._modules)
    if isinstance(item, nn.Module):
        return children(item)
    return item.element if isinstance(item, Many) else union(item.elements) if isinstance(item, Row) else ()


def holds_module(value: Value) -> bool:
    """Returns whether an expression may be a module or hold one."""
    parts = {Row: lambda row: union(row.elements), Many: lambda many: many.element}
    return any(
        isinstance(x, (nn.Module, Tensors)) or (type(x) in parts and holds_module(parts[type(x)](x))) for x in value
    )


def children(module: nn.Module) -> Value:
    return tuple(child for child in module._modules.values() if child is not None)


def element(value: Value, index: Value) -> Value:
    """Returns what ``value[index]`` may be; every element for an unknown index."""
    return union(_element(item, i) for item in value for i in index or (None,))


def _element(item: Any, index: Any) -> Value:
    if isinstance(item, nn.Module) and isinstance(index, str):
        return (item._modules[index],) if item._modules.get(index) is not None else ()
    if isinstance(item, Many) or index is None:
        return item.element if isinstance(item, Many) else _elements(item)
    parts = item.elements if isinstance(item, Row) else [(child,) for child in _elements(item)]
    return parts[index] if isinstance(index, int) and -len(parts) <= index < len(parts) else ()


def attribute(item: Any, name: str) -> Value:
    """Returns what an attribute of an object may be, a ``Getter`` for a property."""
    if isinstance(item, nn.Module):
        return _attribute_of_module(item, name)
    if isinstance(item, Tensors):  # its methods, as ``get``: the call of a Tensors
        return (item,)
    if isinstance(item, type):
        return known(of_class(item, name))
    return known(vars(item).get(name)) if isinstance(item, ModuleType) else ()


def known(entry: Any) -> Value:
    """Returns an object of a Python module or class as a value: functions, classes and modules are followed."""
    entry = inside(entry) if isinstance(entry, staticmethod) else entry
    return (entry,) if isinstance(entry, (*CALLED, ModuleType)) else ()


def python_function(value: Any) -> FunctionType | None:
    """Returns the function inside a method, a partial and decorators that name what they wrap."""
    if isinstance(value, (staticmethod, classmethod)):
        return None
    value = inspect.unwrap(value) if callable(value) else value
    while isinstance(value, functools.partial):
        value = value.func
    value = getattr(value, "__func__", value)
    return value if isinstance(value, FunctionType) else None


def global_of(function: FunctionType, name: str) -> Any:
    """Returns what a name of a function's scope, its module or ``builtins`` refers to, or None."""
    free = function.__code__.co_freevars
    if name in free and function.__closure__:
        with contextlib.suppress(ValueError):  # a cell without contents
            return function.__closure__[free.index(name)].cell_contents
    return function.__globals__.get(name, getattr(builtins, name, None))


def inside(entry: Any) -> Any:
    """Returns the function of a property or static method, and any other object itself."""
    name = {property: "fget", functools.cached_property: "func", staticmethod: "__func__"}.get(type(entry))
    return getattr(entry, name) if name else entry


def _attribute_of_module(module: nn.Module, name: str) -> Value:
    if name == "_parameters":
        return (Tensors(module),)
    of_instance = module if name == "_modules" else module._modules.get(name, vars(module).get(name))
    if isinstance(of_instance, (list, tuple)) and all(isinstance(part, nn.Module) for part in of_instance):
        return (Row(tuple((part,) for part in of_instance)),)
    if isinstance(of_instance, (nn.Module, FunctionType, MethodType)):
        return (of_instance,)
    inherited = of_class(type(module), name)
    if isinstance(inherited, (property, functools.cached_property)) and isinstance(inside(inherited), FunctionType):
        return (Getter(MethodType(inside(inherited), module)),)
    return (MethodType(inherited, module),) if isinstance(inherited, FunctionType) else known(inherited)


def of_class(kind: Any, name: str) -> Any:
    """Returns an attribute of a class as it is written there."""
    return next((vars(base)[name] for base in kind.__mro__ if name in vars(base)), None)


def of_module_method(method: MethodType, arguments: list[Value]) -> Value:
    """Returns what those methods of nn.Module and its containers return that list children or parameters."""
    module: Any = method.__self__
    name = method.__func__.__name__
    if name in PARAMETERS:
        return (Tensors(module),)
    if name in ("values", "children"):
        return (Many(children(module)),)
    if name in ("items", "named_children"):
        return (Many((Row(((), children(module))),)),)
    if name == "get_submodule" and arguments:
        return union(_descendant(module, path) for path in arguments[0] if isinstance(path, str))
    return ()


def _descendant(module: nn.Module, path: str) -> Value:
    value: Value = (module,)
    for name in path.split("."):
        value = element(value, (name,))
    return value
