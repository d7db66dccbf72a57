"""Helpers of kernel tests: the device, seeded inputs, buffers full of NaN."""

from contextlib import contextmanager

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@contextmanager
def poisoned_empty():
    """Makes torch.empty and torch.empty_strided return NaN, so that a test fails if a kernel reads an element before it
    is written or leaves one unwritten."""
    originals = torch.empty, torch.empty_strided

    def poisoned(allocate):
        def empty(*args, **options):
            tensor = allocate(*args, **options)
            return tensor.fill_(float("nan") if tensor.is_floating_point() else -7)

        return empty

    torch.empty, torch.empty_strided = map(poisoned, originals)
    try:
        yield
    finally:
        torch.empty, torch.empty_strided = originals


def randn(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(hash((shape, seed)) % (1 << 31))
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype)


def size(*tensors: torch.Tensor) -> int:
    """Returns the bytes of the tensors."""
    return sum(t.numel() * t.element_size() for t in tensors)
