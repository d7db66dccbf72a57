"""The methods: one file each, with a frozen dataclass of hyperparameters and its hooks into a step.

method.py defines the hooks. The table below lists the combinations that have no meaning.
"""

from __future__ import annotations

from typing import Any

from .. import checks
from .balora import BaLoRA
from .ilora import ILoRA
from .lora_muon import LoRAMuon
from .lora_plus import LoRAPlus
from .lora_rite import LoRARITE
from .method import Method
from .pilora import PiLoRA
from .ref_lora import RefLoRA
from .scale_reg import ScaleReg
from .scaled_adamw import ScaledAdamW
from .scalora import ScaLoRA

__all__ = [
    "BaLoRA",
    "ILoRA",
    "LoRAMuon",
    "LoRAPlus",
    "LoRARITE",
    "PiLoRA",
    "RefLoRA",
    "ScaLoRA",
    "ScaleReg",
    "ScaledAdamW",
]

ORDER = (  # in which the methods' hooks run
    LoRAPlus, ScaleReg, ScaLoRA, ScaledAdamW, RefLoRA, PiLoRA, LoRARITE, LoRAMuon, ILoRA, BaLoRA,
)  # fmt: skip
EXCLUSIVE = (  # at most one method of each row may be used
    ("each decides how the product is shared between its factors", (ScaleReg, ScaLoRA, PiLoRA, ILoRA, BaLoRA)),
    ("each transforms the gradients by the other factor", (ScaLoRA, ScaledAdamW, RefLoRA, PiLoRA)),
    ("RefLoRA's gradients are those of BaLoRA's factors, in which it changes nothing", (RefLoRA, BaLoRA)),
    ("each is an update of its own", (LoRARITE, LoRAMuon)),
    *(
        (f"{update.__name__} is an update of its own", (update, other))
        for update in (LoRARITE, LoRAMuon)
        for other in (LoRAPlus, ScaLoRA, ScaledAdamW, RefLoRA, PiLoRA, BaLoRA)
    ),
)


def compose(methods: object) -> tuple[Method, ...]:
    """Returns the methods in the order in which a step runs them.

    Raises:
        ArgumentError: an entry that is no method, a method that occurs twice, or a combination without a meaning.
    """
    entries: list[Any] = list(methods) if isinstance(methods, (list, tuple)) else [methods]
    for method in entries:
        if type(method) not in ORDER:
            raise checks.ArgumentError("methods", f"instances among {', '.join(__all__)}", checks.shown(method))
    kinds = [type(method) for method in entries]
    for kind in ORDER:
        if kinds.count(kind) > 1:
            raise checks.ArgumentError("methods", "each method once", f"{kind.__name__} {kinds.count(kind)} times")
    for reason, row in EXCLUSIVE:
        names = [kind.__name__ for kind in row if kind in kinds]
        if len(names) > 1:
            raise checks.ArgumentError("methods", f"at most one of these ({reason})", " and ".join(names))
    replacement = next((kind.__name__ for kind in kinds if kind.replaces_adamw), None)
    for method in entries:
        if replacement and isinstance(method, ScaleReg) and not method.decoupled:
            expected = (
                f"ScaleReg(decoupled=True) with {replacement} (whose update takes gradients for those of the product, "
                "and a penalty on the factors has none)"
            )
            raise checks.ArgumentError("methods", expected, checks.shown(method))
    return tuple(sorted(entries, key=lambda method: ORDER.index(type(method))))
