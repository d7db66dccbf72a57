"""What the layer's single ops share: operands without a graph, our launchers or their torch twins, eager providers."""

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
    """Two modules with the same functions."""
    if not setting.triton:
        return reference
    from lora_fast.kernels import linear

    return linear


def eagerly(function: Callable, *args) -> dict[str, Callable[[], Provider]]:
    """``function(*args)``, a dict of results, by eager torch and by torch.compile."""
    same = lambda value: value
    compile_ = lambda: compiled(lambda run: Provider(lambda: run(*args), results=same, compiled=True), function)
    return {"torch": lambda: Provider(lambda: function(*args), results=same), "torch.compile": compile_}


def ours(forward: Callable, context: Callable) -> Callable[[], Provider]:
    return lambda: Provider(forward, results=lambda value: value, context=context)
