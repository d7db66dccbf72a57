"""The methods: one file each, a frozen dataclass of hyperparameters and what it does in a step.

What a method can do is in method.py; with which others it has a meaning, in the table below.
"""

from __future__ import annotations

from .. import checks
from .balora import BaLoRA
from .ilora import ILoRA
from .lora_plus import LoRAPlus
from .lora_rite import LoRARITE
from .pilora import PiLoRA
from .scale_reg import ScaleReg
from .scaled_adamw import ScaledAdamW
from .scalora import ScaLoRA

__all__ = ["BaLoRA", "ILoRA", "LoRAPlus", "LoRARITE", "PiLoRA", "ScaLoRA", "ScaleReg", "ScaledAdamW"]

ORDER = (LoRAPlus, ScaleReg, ScaLoRA, ScaledAdamW, PiLoRA, LoRARITE, ILoRA, BaLoRA)  # within before and within after
ALONE = (  # of each row at most one
    ("each decides how the product is shared between its factors", (ScaleReg, ScaLoRA, PiLoRA, ILoRA, BaLoRA)),
    ("each transforms the gradients by the other factor", (ScaLoRA, ScaledAdamW, PiLoRA)),
    *(
        ("LoRARITE is an update of its own", (LoRARITE, other))
        for other in (LoRAPlus, ScaLoRA, ScaledAdamW, PiLoRA, BaLoRA)
    ),
)


def compose(methods: object) -> tuple:
    """The methods in the order in which a step takes them.

    Raises:
        ArgumentError: something that is no method, one twice, or a combination without meaning.
    """
    methods = list(methods) if isinstance(methods, (list, tuple)) else [methods]
    for method in methods:
        if type(method) not in ORDER:
            raise checks.ArgumentError("methods", f"instances among {', '.join(__all__)}", repr(method))
    kinds = [type(method) for method in methods]
    for kind in ORDER:
        if kinds.count(kind) > 1:
            raise checks.ArgumentError("methods", "each method once", f"{kind.__name__} {kinds.count(kind)} times")
    for reason, row in ALONE:
        both = [kind.__name__ for kind in row if kind in kinds]
        if len(both) > 1:
            raise checks.ArgumentError("methods", f"at most one of these ({reason})", " and ".join(both))
    replacement = next((kind.__name__ for kind in kinds if kind.replaces_adamw), None)
    for method in methods:
        if replacement and isinstance(method, ScaleReg) and not method.decoupled:
            reason = "it takes the gradient of the product alone, and a penalty on the factors in the loss is none"
            raise checks.ArgumentError("methods", f"ScaleReg(decoupled=True) with {replacement} ({reason})", repr(method))
    return tuple(sorted(methods, key=lambda method: ORDER.index(type(method))))
