"""Evaluates the source of a model's methods, and lists the modules whose weight is read.

Assignments, targets of loops and comprehensions, attributes and indices are followed from ``self`` on, and calls of
functions and methods with their arguments. What an expression may be is a value of ``source_values``. A name may be
whatever is assigned to it anywhere before; a branch whose condition is false for the module is left out.
"""

from __future__ import annotations

import ast
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from types import FunctionType, MethodType
from typing import Any

from torch import Tensor, nn

from .source_syntax import WEIGHT, syntax
from .source_syntax import returned as returned_by
from .source_syntax import truth as truth_of
from .source_values import (
    Getter,
    Many,
    Row,
    Tensors,
    Value,
    attribute,
    each,
    element,
    global_of,
    holds_module,
    known,
    of_module_method,
    python_function,
    union,
)

METADATA = ("dtype", "device", "shape", "ndim", "size", "dim", "numel", "requires_grad", "element_size", "data_ptr")
INSPECTORS = (isinstance, hasattr, type, id)  # calls that do not read values
SAME_ELEMENTS = (list, tuple, set, sorted, reversed, iter, dict)  # calls that keep the elements of their argument
DEPTH = 3  # functions whose calls are followed into each other


@dataclass(frozen=True)
class Local:
    """A function or lambda that is defined within a function."""

    node: ast.FunctionDef | ast.Lambda
    reader: _Reader


def modules_read(function: FunctionType, module: nn.Module) -> list[nn.Module]:
    """Returns the other modules whose weight a method of the module reads."""
    reader = _Reader(function, [], (module,), 1)
    reader.enter([(module,)], {})
    return reader.reads


class _Reader(ast.NodeVisitor):
    """Evaluates one call of a function. ``visit`` returns the value of an expression, None if it is unknown.

    Attributes:
        reads: the modules whose weight is read, shared with the readers of the calls.
        owners: the modules whose methods run. A layer's own method reads its own weight.
        names: a local name → what it may be.
        inspected: the expressions of which metadata alone is used.
    """

    def __init__(self, function: FunctionType, reads: list[nn.Module], owners: Value, depth: int):
        self.function, self.reads, self.owners, self.depth = function, reads, owners, depth
        self.names: dict[str, Value] = {}
        self.inspected: set[ast.expr] = set()
        self.running: set[ast.AST] = set()
        self.returns: Value = ()

    def enter(self, arguments: list[Value], keywords: dict[str, Value]) -> Value:
        """Evaluates the function for these arguments and returns what it may return."""
        tree = syntax(self.function)
        return self.run(tree, arguments, keywords) if tree else ()

    def returned(self, owner: Value) -> Value:
        """Evaluates only what a method returns, as far as that depends on ``self``."""
        self.names = dict(zip(self.function.__code__.co_varnames[:1], (owner,), strict=False))
        return union([self.value(expression) for expression in returned_by(self.function)])

    def run(self, node: Any, arguments: list[Value], keywords: dict[str, Value]) -> Value:
        """Evaluates a definition, of the function itself or within it, for these arguments."""
        if node in self.running:
            return ()
        outer, self.names, self.returns = (self.names, self.returns), dict(self.names), ()
        self.running.add(node)
        self.bind_parameters(node.args, arguments, keywords)
        if isinstance(node, ast.Lambda):
            self.returns = self.value(node.body)
        else:
            self.visit_all(node.body)
        returned = self.returns
        self.names, self.returns = outer
        self.running.discard(node)
        return returned

    def bind_parameters(self, parameters: ast.arguments, arguments: list[Value], keywords: dict[str, Value]) -> None:
        positional = [parameter.arg for parameter in (*parameters.posonlyargs, *parameters.args)]
        for name in (*positional, *(parameter.arg for parameter in parameters.kwonlyargs)):
            self.names[name] = keywords.get(name, ())
        self.names |= dict(zip(positional, arguments, strict=False))
        if parameters.vararg:
            self.names[parameters.vararg.arg] = (Row(tuple(arguments[len(positional) :])),)

    def value(self, node: ast.expr | None) -> Value:
        return (self.visit(node) if node else None) or ()

    def visit_all(self, nodes: Sequence[ast.AST]) -> None:
        for node in nodes:
            self.visit(node)

    def read(self, node: ast.expr, modules: Value) -> None:
        """Records that the expression is the weight of one of the modules, unless only its metadata is used."""
        if node not in self.inspected:
            self.reads += [m for m in modules if isinstance(m, nn.Module) and m not in self.owners]

    def read_tensors(self, node: ast.expr, value: Value) -> None:
        self.read(node, tuple(item.module for item in value if isinstance(item, Tensors)))

    # Statements

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self.names[node.name] = (Local(node, self),)
        self.run(node, [], {})

    def visit_Return(self, node: ast.Return) -> None:
        self.returns = union((self.returns, self.value(node.value)))

    def visit_Assign(self, node: ast.Assign) -> None:
        value = self.value(node.value)
        for target in node.targets:
            self.bind(target, value)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        self.bind(node.target, self.value(node.value))

    def visit_For(self, node: ast.For) -> None:
        self.bind(node.target, each(self.value(node.iter)))
        self.visit_all([*node.body, *node.orelse])

    def visit_If(self, node: ast.If) -> None:
        for part in self.branches(node):
            self.visit_all(part)

    def branches(self, node: Any) -> list[Any]:
        """Returns the branches that may run."""
        self.visit(node.test)
        module = self.names.get("self", ())
        truth = truth_of(node.test, module[0]) if len(module) == 1 else None
        return [branch for branch, never in ((node.body, False), (node.orelse, True)) if truth is not never]

    def bind(self, target: ast.expr, value: Value) -> None:
        """Assigns a value to a target."""
        if isinstance(target, ast.Name):
            self.names[target.id] = union((self.names.get(target.id, ()), value))
        elif isinstance(target, (ast.Tuple, ast.List)):
            self.read_tensors(target, value)
            has_star = any(isinstance(part, ast.Starred) for part in target.elts)
            for i, part in enumerate(target.elts):
                self.bind(part, element(value, () if has_star else (i,)))
        elif isinstance(target, ast.Starred):
            self.bind(target.value, (Many(value),))

    # Expressions

    def visit_Constant(self, node: ast.Constant) -> Value:
        return (node.value,)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> Value:
        numbers = [item for item in self.value(node.operand) if isinstance(item, int)]
        return tuple(-number for number in numbers) if isinstance(node.op, ast.USub) else ()

    def visit_Name(self, node: ast.Name) -> Value:
        if node.id in self.names:
            return self.names[node.id]
        return known(global_of(self.function, node.id))

    def visit_NamedExpr(self, node: ast.NamedExpr) -> Value:
        value = self.value(node.value)
        self.bind(node.target, value)
        return value

    def visit_IfExp(self, node: ast.IfExp) -> Value:
        return union([self.value(branch) for branch in self.branches(node)])

    def visit_BoolOp(self, node: ast.BoolOp) -> Value:
        return union([self.value(part) for part in node.values])

    def visit_Tuple(self, node: ast.Tuple | ast.List) -> Value:
        values = tuple(self.value(part) for part in node.elts)
        has_star = any(isinstance(part, ast.Starred) for part in node.elts)
        return (Many(union(values)) if has_star else Row(values),)

    visit_List = visit_Tuple

    def visit_Starred(self, node: ast.Starred) -> Value:
        value = self.value(node.value)
        self.read_tensors(node, value)
        return each(value)

    def visit_ListComp(self, node: Any) -> Value:
        for generator in node.generators:
            self.bind(generator.target, each(self.value(generator.iter)))
            self.visit_all(generator.ifs)
        if isinstance(node, ast.DictComp):
            self.visit(node.key)
        return (Many(self.value(node.value if isinstance(node, ast.DictComp) else node.elt)),)

    visit_SetComp = visit_DictComp = visit_GeneratorExp = visit_ListComp

    def visit_Lambda(self, node: ast.Lambda) -> Value:
        self.run(node, [], {})
        return (Local(node, self),)

    def visit_Subscript(self, node: ast.Subscript) -> Value:
        value, index = self.value(node.value), self.value(node.slice)
        if not all(isinstance(i, str) and i != WEIGHT for i in index):
            self.read_tensors(node, value)
        return value if isinstance(node.slice, ast.Slice) else element(value, index)

    def visit_Attribute(self, node: ast.Attribute) -> Value:
        if _is_no_value(node.attr) or (node.attr == "data" and node in self.inspected):
            self.inspected.add(node.value)
        value = self.value(node.value)
        return self.attribute(node, value, node.attr) if isinstance(node.ctx, ast.Load) else ()

    def attribute(self, node: ast.expr, value: Value, name: str) -> Value:
        """Returns an attribute, which the expression reads."""
        if name == WEIGHT:
            self.read(node, value)
            if node in self.inspected:
                return ()
        attributes = union(attribute(item, name) for item in value)
        return union(self.call(node, x.method, [], {}) if isinstance(x, Getter) else (x,) for x in attributes)

    def visit_Call(self, node: ast.Call) -> Value:
        callees = self.value(node.func)
        if any(callee is inspector for callee in callees for inspector in INSPECTORS):
            return ()
        values = [(isinstance(part, ast.Starred), self.value(part)) for part in node.args]
        arguments = [value for _, value in itertools.takewhile(lambda pair: not pair[0], values)]
        keywords = {}
        for keyword in node.keywords:
            value = self.value(keyword.value)
            if keyword.arg is None:
                self.read_tensors(node, value)
            else:
                keywords[keyword.arg] = value
        passed = [
            self.call(node, item, arguments[i + 1 :], keywords)  # by a checkpoint or partial
            for i, value in enumerate(arguments)
            for item in value
            if isinstance(item, (FunctionType, MethodType, Local))
        ]
        return union([*(self.call(node, callee, arguments, keywords) for callee in callees), *passed])

    def call(self, node: ast.expr, callee: Any, arguments: list[Value], keywords: dict[str, Value]) -> Value:
        """Returns what a call may return, and records the weights that it reads."""
        if isinstance(callee, Local):
            return callee.reader.run(callee.node, arguments, keywords)
        if isinstance(callee, Tensors):  # a method of one
            if arguments and WEIGHT in arguments[0]:
                self.read(node, (callee.module,))
            return () if arguments else (callee,)
        if isinstance(callee, MethodType) and isinstance(callee.__self__, nn.Module):
            return of_module_method(callee, arguments) or self.follow(callee, arguments, keywords)
        if isinstance(callee, (FunctionType, nn.Module)):
            return self.follow(callee, arguments, keywords)
        return self.call_of_builtin(node, callee, arguments)

    def call_of_builtin(self, node: ast.expr, callee: Any, arguments: list[Value]) -> Value:
        if callee is getattr and len(arguments) > 1:
            names = [name for name in arguments[1] if isinstance(name, str)]
            return union(self.attribute(node, arguments[0], name) for name in names)
        if callee is zip:
            return (Many((Row(tuple(each(argument) for argument in arguments)),)),)
        if callee is enumerate and arguments:
            return (Many((Row(((), each(arguments[0]))),)),)
        return arguments[0] if arguments and any(callee is kept for kept in SAME_ELEMENTS) else ()

    def follow(self, callee: Any, arguments: list[Value], keywords: dict[str, Value]) -> Value:
        """Evaluates a call of a function, method or module to which modules are passed. Of a method's other calls only
        what it returns is evaluated."""
        passes = any(holds_module(value) for value in (*arguments, *keywords.values()))
        if isinstance(callee, nn.Module):
            callee = next(iter(attribute(callee, "forward")), None) if passes else None
        function = python_function(callee)
        owner: Value = ()
        if isinstance(callee, MethodType):
            owner = (callee.__self__,)
            arguments = [owner, *arguments]
        if function is None or self.depth == DEPTH or not (passes or owner):
            return ()
        reader = _Reader(function, self.reads, self.owners + owner, self.depth + 1)
        return reader.enter(arguments, keywords) if passes else reader.returned(owner)


def _is_no_value(attribute: str) -> bool:
    """Returns whether an attribute of a weight is none of its values, but metadata, a method that changes it in place,
    or what only quantised weights have."""
    is_metadata = attribute in METADATA or attribute.startswith("is_")
    return is_metadata or attribute.endswith("_") or not hasattr(Tensor, attribute)
