"""Calls of the public functions with one argument replaced by a value that a caller may pass by mistake."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from tiny import ShardedTensor
from torch import Tensor, nn

Judge = Callable[[Any], bool]


class Unprintable:
    """An object whose repr fails."""

    def __repr__(self):
        raise RuntimeError("no repr")


def nested(depth: int = 3000) -> list:
    """Returns a list in a list, ``depth`` times: its repr is a RecursionError."""
    value: list = []
    for _ in range(depth):
        value = [value]
    return value


def endless() -> list:
    value: list = []
    value.append(value)
    return value


VALUES: dict[str, Callable[[], Any]] = {
    "None": lambda: None,
    "True": lambda: True,
    "False": lambda: False,
    "0": lambda: 0,
    "-1": lambda: -1,
    "2": lambda: 2,
    "1.5": lambda: 1.5,
    "10**400": lambda: 10**400,
    "-10**5000": lambda: -(10**5000),
    "2**63": lambda: 2**63,
    "1e308": lambda: 1e308,
    "nan": lambda: math.nan,
    "inf": lambda: math.inf,
    "complex": lambda: 2 + 3j,
    "str": lambda: "x",
    "empty str": lambda: "",
    "long str": lambda: "x" * 5000,
    "str with a null": lambda: "x\0",
    "bytes": lambda: b"x",
    "list": lambda: [],
    "long list": lambda: [1] * 5000,
    "nested list": nested,
    "list in itself": endless,
    "list of None": lambda: [None, None],
    "tuple": lambda: (0.5, 0.5),
    "dict": lambda: {},
    "dict of dict": lambda: {"a": {"b": 1}},
    "set": lambda: {1, 2},
    "generator": lambda: (x for x in (1, 2)),
    "object": object,
    "object without repr": Unprintable,
    "class": lambda: int,
    "function": lambda: lambda *args: args,
    "numpy nan": lambda: np.float32("nan"),
    "numpy int": lambda: np.int64(3),
    "numpy bool": lambda: np.bool_(True),
    "array": lambda: np.ones((3, 4)),
    "scalar tensor": lambda: torch.tensor(2.0),
    "tensor of two": lambda: torch.ones(2),
    "matrix": lambda: torch.ones(7, 5),
    "meta matrix": lambda: torch.ones(4, 4, device="meta"),
    "int matrix": lambda: torch.ones(4, 4, dtype=torch.int64),
    "empty tensor": lambda: torch.ones(0),
    "module": lambda: nn.Linear(3, 2),
    "parameter": lambda: nn.Parameter(torch.ones(3)),
    "dtype": lambda: torch.float16,
    "device": lambda: torch.device("meta"),
}
TENSORS: dict[str, Callable[[Tensor], Any]] = {
    "float64": lambda x: x.double(),
    "float16": lambda x: x.half(),
    "bfloat16": lambda x: x.bfloat16(),
    "int64": lambda x: x.long(),
    "bool": lambda x: x.bool(),
    "complex": lambda x: x.to(torch.complex64),
    "float8": lambda x: x.to(torch.float8_e4m3fn),
    "on meta": lambda x: x.to("meta"),
    "sparse": lambda x: x.to_sparse(),
    "subclass": lambda x: x.as_subclass(ShardedTensor),
    "one dimension more": lambda x: x[None],
    "one dimension less": lambda x: x[0],
    "no rows": lambda x: x[:0],
    "no columns": lambda x: x[..., :0],
    "a row less": lambda x: x[:-1],
    "a column less": lambda x: x[..., :-1],
    "transposed": lambda x: x.mT if x.dim() > 1 else x,
    "strided": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "expanded": lambda x: x[:1].expand(x.shape),
    "NaN": lambda x: torch.full_like(x, math.nan),
    "infinite": lambda x: torch.full_like(x, math.inf),
    "huge": lambda x: torch.full_like(x, 1e30),
    "trained": lambda x: x.clone().requires_grad_(),
    "a list": lambda x: x.tolist(),
    "numpy": lambda x: x.numpy(),
}
LISTS: dict[str, Callable[[Any], Any]] = {
    "twice": lambda x: [*x, *x],
    "one less": lambda x: x[:-1],
    "nested once": lambda x: [x],
    "with None": lambda x: [None, *x[1:]],
    "reversed": lambda x: x[::-1],
    "a generator": lambda x: (entry for entry in x),
    "a dict": lambda x: dict(enumerate(x)),
}


def replacements(value: Any) -> dict[str, Callable[[], Any]]:
    """Returns the values that replace a valid one, by name."""
    variants: dict = TENSORS if isinstance(value, Tensor) else LISTS if isinstance(value, list) else {}
    return VALUES | {name: (lambda change=change: change(value)) for name, change in variants.items()}


def copied(value: Any, depth: int = 3) -> Any:
    """Returns copies of the tensors in a value, which a call may change in place."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    is_short = type(value) in (list, tuple) and len(value) < 9 and depth
    return type(value)(copied(entry, depth - 1) for entry in value) if is_short else value


@dataclass
class Row:
    """A valid call.

    Attributes:
        name: the function's name. build: returns the function and its keyword arguments, new for each call.
        legit: for each argument, whether a value that replaced it may be accepted. An argument that is missing takes
            any value, for which ``judge`` decides alone.
        judge: whether a result is that of the arguments.
        skip: arguments with the names of replacements that are left out: functions of the caller, which may raise.
    """

    name: str
    build: Callable[[], tuple[Callable, dict[str, Any]]]
    legit: dict[str, Judge] = field(default_factory=dict)
    judge: Callable[[dict[str, Any], Any], bool] = lambda kwargs, result: True
    skip: frozenset[tuple[str, str]] = frozenset()

    def calls(self) -> Iterator[tuple[str, str]]:
        """Yields an argument and the name of its replacement for each call."""
        for argument, value in self.build()[1].items():
            for name in replacements(value):
                if (argument, name) not in self.skip:
                    yield argument, name

    def run(self, argument: str, replacement: str) -> tuple[bool, Any]:
        """Calls the function with one argument replaced. Returns whether the result is right, and the result."""
        function, kwargs = self.build()
        value = kwargs[argument] = replacements(kwargs[argument])[replacement]()
        before = {name: copied(value) for name, value in kwargs.items()}
        result = function(**kwargs)
        return self.legit.get(argument, lambda value: True)(value) and self.judge(before, result), result
