"""What tests of kernels share: where they run, seeded inputs, buffers full of NaN."""

from contextlib import contextmanager

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@contextmanager
def poisoned_empty():
    """torch.empty and torch.empty_strided full of NaN: a kernel that leaves an element unwritten, or reads one,
    shows."""
    kept = torch.empty, torch.empty_strided
    fill = lambda t: t.fill_(float("nan") if t.is_floating_point() else -7)
    torch.empty, torch.empty_strided = (lambda *a, made=made, **k: fill(made(*a, **k)) for made in kept)
    try:
        yield
    finally:
        torch.empty, torch.empty_strided = kept


def randn(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(hash((shape, seed)) % (1 << 31))
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype)


def size(*tensors: torch.Tensor) -> int:
    """Bytes."""
    return sum(t.numel() * t.element_size() for t in tensors)
