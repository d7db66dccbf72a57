"""The syntax trees of functions, what they return, and conditions over attributes of a module."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from types import CodeType, FunctionType

from torch import Tensor, nn

WEIGHT = "weight"
CONDITION = (ast.Attribute, ast.Name, ast.Constant, ast.Compare, ast.cmpop, ast.expr_context)  # nodes of one


@functools.lru_cache(maxsize=4096)
def syntax(function: FunctionType) -> ast.FunctionDef | ast.AsyncFunctionDef | None:
    """Returns the syntax tree of a function's definition, or None where there is no source."""
    try:
        definition = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    except (OSError, TypeError, SyntaxError):
        return None
    return definition if isinstance(definition, (ast.FunctionDef, ast.AsyncFunctionDef)) else None


@functools.lru_cache(maxsize=4096)
def returned(function: FunctionType) -> list[ast.expr]:
    """Returns the expressions that a function returns. torch's own methods return no child of a module."""
    tree = None if str(function.__module__).startswith("torch.") else syntax(function)
    nodes = ast.walk(tree) if tree else ()
    return [node.value for node in nodes if isinstance(node, ast.Return) and node.value is not None]


def truth(node: ast.expr, module: nn.Module) -> bool | None:
    """Returns whether a condition over attributes of the module holds at every call, or None if that is unknown."""
    if isinstance(node, ast.BoolOp):
        parts, decisive = [truth(part, module) for part in node.values], isinstance(node.op, ast.Or)
        return decisive if decisive in parts else None if None in parts else not decisive
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        inner = truth(node.operand, module)
        return None if inner is None else not inner
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "hasattr" and len(node.args) == 2:
        owner, name = node.args
        if isinstance(owner, ast.Attribute) and owner.attr == WEIGHT and isinstance(name, ast.Constant):
            return None if hasattr(Tensor, str(name.value)) else False  # of a quantised weight
    code = _condition(node)
    if code is None:
        return None
    try:
        return bool(eval(code, {"__builtins__": {}}, {"self": module}))
    except Exception:  # an attribute that exists only at some calls
        return None


@functools.lru_cache(maxsize=16384)
def _condition(node: ast.expr) -> CodeType | None:
    """Returns the code of an expression over attributes of ``self`` alone, or None of another one."""
    parts = list(ast.walk(node))
    names = {part.id for part in parts if isinstance(part, ast.Name)}
    attributes = {part.attr for part in parts if isinstance(part, ast.Attribute)}
    plain = all(isinstance(part, CONDITION) for part in parts)
    if not plain or names != {"self"} or attributes & {"training", WEIGHT}:
        return None
    return compile(ast.Expression(node), "<condition>", "eval")
