"""Provides the single ops of the layer with operands without a graph, our launchers or their torch twins, and eager
providers."""

from collections.abc import Callable

from lora_fast.ops.reference import linear as reference
from suite.cases import Case
from suite.comparison import Provider, Setting
from suite.ops.providers import Operands, compiled


def operands(case: Case, setting: Setting) -> Operands:
    op = Operands.of(case, setting.device)
    for name in ("x", "lora_A", "lora_B"):
        setattr(op, name, getattr(op, name).detach())
    return op


def launchers(setting: Setting):
    """Returns the kernels' module or its torch twin; both have the same functions."""
    if not setting.triton:
        return reference
    from lora_fast.kernels import linear

    return linear


def _unchanged(value):
    return value


def eagerly(function: Callable, *args) -> dict[str, Callable[[], Provider]]:
    """Returns providers of ``function(*args)``, a dict of results, by eager torch and by torch.compile."""

    def compile_() -> Provider:
        return compiled(lambda run: Provider(lambda: run(*args), results=_unchanged, compiled=True), function)

    return {"torch": lambda: Provider(lambda: function(*args), results=_unchanged), "torch.compile": compile_}


def ours(forward: Callable, context: Callable) -> Callable[[], Provider]:
    """Returns a builder of a provider whose forward returns a dict of results."""
    return lambda: Provider(forward, results=_unchanged, context=context)
