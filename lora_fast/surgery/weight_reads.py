"""Finds layers whose weight a model reads without calling the layer, so that an adapter on them would have no effect.

Fused kernels take weights as arguments: Mamba's CUDA kernels ``self.out_proj.weight``, a fused linear cross-entropy
``self.lm_head.weight``, ``nn.TransformerEncoderLayer`` those of its feed-forward. The reads are found in the source of
the methods of each module's class, a patched ``forward`` included. Reads of a dtype, device or shape do not count, nor
do reads under an ``if`` whose condition is false for the module, as BLOOM's ``if self.pretraining_tp > 1``.
"""

from __future__ import annotations

import ast
import functools
import inspect
import re
import textwrap
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import Any

from torch import Tensor, nn

WEIGHT = "weight"
METADATA = ("dtype", "device", "shape", "ndim", "size", "dim", "numel", "requires_grad", "element_size", "data_ptr")
INSPECTED = ("isinstance", "hasattr", "type", "id", "getattr")  # calls that do not read values
NOT_IN_FORWARD = re.compile(
    r"__(?!call__)\w+__|_?(init|reset|resize|tie|load|save|prune|convert)|set_|get_|from_|extra_"
)
CONDITION = (ast.Attribute, ast.Name, ast.Constant, ast.Compare, ast.cmpop, ast.expr_context)  # nodes of one
DEPTH = 3  # calls of functions with the module as an argument that are followed

Chain = tuple[str, ...]  # the names from a module to a descendant; "*" for an index that is not constant
Condition = tuple[ast.expr, bool]  # an expression over self, and the truth under which the read happens


@dataclass(frozen=True)
class Read:
    """A read of a weight in a method: of which descendant (or, with an empty chain, of the module itself), under which
    conditions, and in which function."""

    chain: Chain
    conditions: tuple[Condition, ...]
    function: str


def weight_reads(model: nn.Module) -> dict[nn.Module, str]:
    """Returns module → which method reads its weight without calling it, for the descendants of all modules."""
    reasons: dict[nn.Module, str] = {}
    classes: dict[type[nn.Module], list[Read]] = {}
    for module in model.modules():
        kind = type(module)
        if kind not in classes:
            classes[kind] = _reads_of_class(kind)
        replaced = _reads_of_function(_python_function(module.__dict__.get("forward")), 0)
        for read in (*classes[kind], *replaced):
            # An empty chain is a read of the module's own weight, as every layer does.
            if read.chain and all(_truth(test, module) is not (not wanted) for test, wanted in read.conditions):
                reason = f"{kind.__name__}.{read.function} reads its weight without calling it"
                for layer in _descendants(module, read.chain):
                    reasons.setdefault(layer, reason)
    return reasons


def _reads_of_class(kind: type[nn.Module]) -> list[Read]:
    """Returns the reads in the methods of a class."""
    methods: dict[str, Any] = {}
    for base in reversed(kind.__mro__):
        if issubclass(base, nn.Module) and base is not nn.Module:
            methods |= vars(base)
    wanted = [value for name, value in methods.items() if not NOT_IN_FORWARD.match(name)]
    return [read for value in wanted for read in _reads_of_function(_python_function(value), 0)]


def _python_function(value: Any) -> FunctionType | None:
    """Returns the function inside a method, a partial and decorators that name what they wrap."""
    if isinstance(value, (staticmethod, classmethod)):
        return None
    value = inspect.unwrap(value) if callable(value) else value
    while isinstance(value, functools.partial):
        value = value.func
    value = getattr(value, "__func__", value)
    return value if isinstance(value, FunctionType) else None


@functools.lru_cache(maxsize=4096)
def _reads_of_function(function: FunctionType | None, position: int, depth: int = 0) -> tuple[Read, ...]:
    """Returns the reads of a function whose argument at ``position`` is the module."""
    if function is None or depth == DEPTH or not _mentions_weight(function, depth):
        return ()
    arguments = function.__code__.co_varnames[: function.__code__.co_argcount]
    tree = _syntax(function)
    if tree is None or position >= len(arguments):
        return ()
    reader = _Reader(function, arguments[position], depth)
    for statement in tree.body:
        reader.visit(statement)
    return tuple(reader.reads)


def _mentions_weight(function: FunctionType, depth: int) -> bool:
    """Returns whether the function, or one that it calls by name, has an attribute ``weight`` in its code. It spares
    most functions the parsing of their source."""
    if _has_name(function.__code__, WEIGHT):
        return True
    called = (function.__globals__.get(name) for name in function.__code__.co_names)
    return depth < DEPTH - 1 and any(isinstance(f, FunctionType) and _has_name(f.__code__, WEIGHT) for f in called)


def _has_name(code: CodeType, name: str) -> bool:
    return name in code.co_names or any(isinstance(part, CodeType) and _has_name(part, name) for part in code.co_consts)


def _syntax(function: FunctionType) -> ast.FunctionDef | ast.AsyncFunctionDef | None:
    """Returns the syntax tree of a function's definition, or None where there is no source."""
    try:
        definition = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    except (OSError, TypeError, SyntaxError):
        return None
    return definition if isinstance(definition, (ast.FunctionDef, ast.AsyncFunctionDef)) else None


class _Reader(ast.NodeVisitor):
    """Collects the reads of one function.

    Attributes:
        reads: the reads of the function.
        aliases: a local name → the chains that were assigned to it, from the module's argument on.
        conditions: those of the ``if`` statements around the current node.
    """

    def __init__(self, function: FunctionType, module_name: str, depth: int):
        self.function, self.module_name, self.depth = function, module_name, depth
        self.reads: list[Read] = []
        self.aliases: dict[str, set[Chain]] = {module_name: {()}}
        self.conditions: tuple[Condition, ...] = ()

    def visit_If(self, node: ast.If | ast.IfExp) -> None:
        self.visit(node.test)
        outer = self.conditions
        for part, wanted in ((node.body, True), (node.orelse, False)):
            if self.module_name == "self":  # a helper's argument may have another name than the test is evaluated with
                self.conditions = (*outer, (node.test, wanted))
            for child in part if isinstance(part, list) else [part]:
                self.visit(child)
        self.conditions = outer

    visit_IfExp = visit_If

    def visit_Assign(self, node: ast.Assign) -> None:
        self.visit(node.value)
        for target in node.targets:
            if isinstance(target, ast.Name):
                self.aliases.setdefault(target.id, set()).update(self.chains(node.value))

    def visit_For(self, node: ast.For) -> None:
        source, target = node.iter, node.target
        if isinstance(source, ast.Call) and isinstance(source.func, ast.Name) and source.func.id == "enumerate":
            source = source.args[0]
            target = target.elts[-1] if isinstance(target, ast.Tuple) else target
        if isinstance(target, ast.Name):
            self.aliases.setdefault(target.id, set()).update((*chain, "*") for chain in self.chains(source))
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if node.attr == WEIGHT and isinstance(node.ctx, ast.Load):
            self.add(node.value)
        elif not (_is_weight(node.value) and _is_no_value(node.attr)):
            self.visit(node.value)

    def visit_Call(self, node: ast.Call) -> None:
        name = node.func.id if isinstance(node.func, ast.Name) else None
        if name == "getattr" and len(node.args) > 1 and getattr(node.args[1], "value", None) == WEIGHT:
            self.add(node.args[0])
        if name in INSPECTED:
            return
        self.generic_visit(node)
        called = self.function.__globals__.get(name) if name else None
        if isinstance(called, FunctionType):
            for position, argument in enumerate(node.args):
                for chain in self.chains(argument):
                    inner = _reads_of_function(inspect.unwrap(called), position, self.depth + 1)
                    self.reads += [
                        Read((*chain, *read.chain), self.conditions, self.function.__name__) for read in inner
                    ]

    def add(self, owner: ast.expr) -> None:
        self.reads += [Read(chain, self.conditions, self.function.__name__) for chain in self.chains(owner)]

    def chains(self, node: ast.expr) -> set[Chain]:
        """Returns the descendants of the module that an expression may be."""
        if isinstance(node, ast.Name):
            return self.aliases.get(node.id, set())
        if isinstance(node, ast.Attribute):
            return {(*chain, node.attr) for chain in self.chains(node.value)}
        if isinstance(node, ast.Subscript):
            index = str(node.slice.value) if isinstance(node.slice, ast.Constant) else "*"
            return {(*chain, index) for chain in self.chains(node.value)}
        return set()


def _is_weight(node: ast.expr) -> bool:
    """Returns whether an expression is ``….weight`` or ``….weight.data``."""
    if isinstance(node, ast.Attribute) and node.attr == "data":
        node = node.value
    return isinstance(node, ast.Attribute) and node.attr == WEIGHT


def _is_no_value(attribute: str) -> bool:
    """Returns whether an attribute of a weight is none of its values, but metadata, a method that changes it in place,
    or what only quantised weights have."""
    is_metadata = attribute in METADATA or attribute.startswith("is_")
    return is_metadata or attribute.endswith("_") or not hasattr(Tensor, attribute)


def _truth(node: ast.expr, module: nn.Module) -> bool | None:
    """Returns whether a condition over attributes of the module holds at every call, or None if that is unknown."""
    if isinstance(node, ast.BoolOp):
        parts, decisive = [_truth(part, module) for part in node.values], isinstance(node.op, ast.Or)
        return decisive if decisive in parts else None if None in parts else not decisive
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        truth = _truth(node.operand, module)
        return None if truth is None else not truth
    names = {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
    attributes = {part.attr for part in ast.walk(node) if isinstance(part, ast.Attribute)}
    plain = all(isinstance(part, CONDITION) for part in ast.walk(node))
    if not plain or names != {"self"} or attributes & {"training", WEIGHT}:
        return None
    try:
        return bool(eval(compile(ast.Expression(node), "<condition>", "eval"), {"__builtins__": {}}, {"self": module}))
    except Exception:  # an attribute that exists only at some calls
        return None


def _descendants(module: nn.Module, chain: Chain) -> list[nn.Module]:
    """Returns the descendants under a chain of names; all children for "*"."""
    layers = [module]
    for name in chain:
        children = [layer._modules for layer in layers]
        layers = [c for named in children for key, c in named.items() if c is not None and name in ("*", key)]
    return layers
