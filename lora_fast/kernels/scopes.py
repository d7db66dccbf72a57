"""Values that hold in all threads of the process while a context runs, whichever thread began it.

They are not per thread, because autograd runs the backward of a GPU's ops in a thread of its own, and that backward
must see what the thread that called it has set.
"""

import threading
from contextlib import contextmanager
from typing import Generic, TypeVar

T = TypeVar("T")


class Scopes(Generic[T]):
    """The values of the contexts that run now. Contexts of several threads may end in any order.

    Attributes:
        values: in the order in which the contexts began. The tuple is replaced as a whole, so that other threads may
            read it without the lock.
    """

    def __init__(self) -> None:
        self.values: tuple[T, ...] = ()
        self._lock = threading.Lock()

    @contextmanager
    def within(self, value: T):
        """Adds the value within the context."""
        with self._lock:
            self.values = *self.values, value
        try:
            yield
        finally:
            with self._lock:  # compared by identity, because another context may have an equal value
                last = max(i for i, running in enumerate(self.values) if running is value)
                self.values = self.values[:last] + self.values[last + 1 :]
