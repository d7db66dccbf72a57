# SPDX-License-Identifier: Apache-2.0
"""What a case of the checks is."""

from functools import lru_cache

import torch
from library import Library
from triton import knobs

# Sizes (d_in, d_out) of two pairs: small in Triton's interpreter, else such that a factor takes several programs.
PAIRS = ((272, 208), (528, 96)) if knobs.runtime.interpret else ((1152, 1280), (5008, 2064))


class Case:
    """A case.

    Attributes:
        tensors: by name, the inputs and the tensors changed in place.
        python, c: functions that take the tensors and return the results.
        memory: for each launch, by parameter, the C side's memory for what the Python launcher allocates; None for a
            null pointer.
        tables: for each launch, or one for all, the address and contents of every part of its table by parameter. None
            stands for contents that kernels change.
        table: the table in device memory.
    """

    def __init__(self, library: Library, device: torch.device, dtype: torch.dtype, r: int):
        self.library, self.device, self.dtype, self.r = library, device, dtype, r
        self.tensors: dict[str, torch.Tensor] = {}
        self.memory: list[dict[str, torch.Tensor]] = []
        self.table: torch.Tensor | None = None
        self.tables: list[dict[str, tuple[int, list | None]]] = []

    def add(self, name: str, *shape: int, dtype: torch.dtype | None = None, fill=None) -> None:
        value = normal(len(self.tensors), shape) if fill is None else torch.full(shape, fill)
        self.tensors[name] = value.to(self.device, dtype or self.dtype, copy=True)

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype or self.dtype, device=self.device)

    def scratch(self, size: int) -> torch.Tensor:
        return torch.empty(max(16, size), dtype=torch.uint8, device=self.device)


@lru_cache(maxsize=64)
def normal(seed: int, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
