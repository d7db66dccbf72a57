"""Calls of functions as soon as someone else has imported a module, which is too slow to import for that."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from typing import Any


def after_import(name: str, call: Callable[[], None]) -> None:
    """Calls ``call`` now if the module is imported already, or as soon as it is."""
    if name in sys.modules:
        call()
    else:
        sys.meta_path.insert(0, _AtImport(name, call))


class _AtImport:
    """A finder of modules that makes the call after the module's own loader has run it."""

    def __init__(self, name: str, call: Callable[[], None]):
        self._name, self._call = name, call

    def find_spec(self, name: str, path=None, target=None):
        """Returns the spec that others find, also to those who only ask whether there is such a module."""
        if name != self._name:
            return None
        sys.meta_path.remove(self)  # type: ignore[arg-type]
        spec: Any = importlib.util.find_spec(name)
        sys.meta_path.insert(0, self)  # type: ignore[arg-type]
        run = spec.loader.exec_module

        def exec_module(module) -> None:
            run(module)
            sys.meta_path.remove(self)  # type: ignore[arg-type]
            self._call()

        spec.loader.exec_module = exec_module
        return spec
