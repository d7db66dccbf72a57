"""The hooks of a method into an optimizer step. A method is a frozen dataclass of hyperparameters that overrides the
hooks it needs."""

from __future__ import annotations

from dataclasses import fields

from .. import checks
from ..batches.batch import Batch, Shapes, adamw_state
from ..batches.pairs import Pair


class Method:
    """The protocol of all methods. A step first runs every method's ``before_all``. Then, for each batch, it runs every
    method's ``before``, AdamW or the ``update`` that replaces it, and every method's ``after``.

    Attributes:
        has_after: whether ``after`` does anything. AdamW then also computes the Grams of the new factors.
        replaces_adamw: whether the method has its own update. AdamW does not run; ``update`` runs in its place.
        uses_both_factors: whether the method needs both factors of a pair and their gradients.
        needs_stacks: whether the method works on a ``StackedBatch`` only, on every device.
        changes_weights: whether the method changes frozen weights, into which no adapter may then be merged at a step.
    """

    has_after = False
    replaces_adamw = False
    uses_both_factors = True
    needs_stacks = False
    changes_weights = False

    def __post_init__(self) -> None:
        """Replaces numbers of numpy by Python's, because the method's repr identifies it in an optimizer's state."""
        for field in fields(self):  # type: ignore[arg-type]  # every subclass is a dataclass
            object.__setattr__(self, field.name, checks.python_number(getattr(self, field.name)))

    def check(self, pairs: list[Pair]) -> None:
        """Raises ArgumentError if the method cannot train these pairs on the current backend. Runs for all pairs when
        some are added, and for the pairs of a step before the first step and whenever that set changes."""

    def layout(self, pair: Pair) -> tuple[Shapes, Shapes]:
        """Returns shapes and dtypes of the state of a and of b. They include AdamW's moments unless the method replaces
        AdamW."""
        return adamw_state(pair)

    def before_all(self, batches: list[Batch], memory: dict) -> None:
        """Does the work that needs all batches at once. ``memory`` is saved with the optimizer's state."""

    def before(self, batch: Batch) -> None:
        """Changes gradients, factors or moments before AdamW."""

    def update(self, batch: Batch) -> None:
        """Updates the factors in place of AdamW, unless ``before_all`` has updated those of all batches together."""

    def after(self, batch: Batch) -> None:
        """Changes the factors after AdamW or the update that replaces it."""
