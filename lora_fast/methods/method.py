"""What a method can do in a step. A method is a frozen dataclass of hyperparameters that overrides what it needs."""

from __future__ import annotations

from ..batches.batch import Batch, Shapes, adamw_state
from ..batches.pairs import Pair


class Method:
    """A step runs, for all methods in their order: ``before_all``; then for each batch ``before``, AdamW or the
    ``update`` that replaces it, ``after``.

    Attributes:
        has_after: whether ``after`` does anything: AdamW then leaves the Grams of its result.
        replaces_adamw: whether the method is an update of its own: AdamW does not run, ``update`` runs in its place.
        uses_both_factors: whether the method needs both factors of a pair and their gradients.
        needs_stacks: whether the method works on plain-torch stacks only, on every device.
    """

    has_after = False
    replaces_adamw = False
    uses_both_factors = True
    needs_stacks = False

    def check(self, pairs: list[Pair]) -> None:
        """Raises ArgumentError if the method cannot train these on the backend that now serves them. Asked of all pairs
        when they are added, and of those that a step works on before the first step and after a change of them."""

    def layout(self, pair: Pair) -> tuple[Shapes, Shapes]:
        """Shapes and dtypes of the state of a and of b; they hold AdamW's at least, unless the method replaces it."""
        return adamw_state(pair)

    def before_all(self, batches: list[Batch], memory: dict) -> None:
        """What needs all batches at once. ``memory`` is saved with the optimizer's state."""

    def before(self, batch: Batch) -> None:
        """Changes gradients, factors or moments."""

    def update(self, batch: Batch) -> None:
        """Moves the factors in AdamW's place, unless ``before_all`` has moved those of all batches together."""

    def after(self, batch: Batch) -> None:
        """Changes the factors that AdamW, or the update in its place, left."""
