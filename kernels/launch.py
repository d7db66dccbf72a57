"""What every launcher needs: checks, row-contiguous views, the device guard, the dropout arguments."""

from contextlib import nullcontext
from typing import NamedTuple

import torch

LARGEST_RANK = 256


class Keep(NamedTuple):
    """A dropout mask that is never stored: an element is kept when its 16-bit number is at least ``drop_level``."""

    seed: int | torch.Tensor  # a 0-d int64 tensor on the device where the value must not reach the host
    drop_level: int

    @staticmethod
    def arguments(keep: "Keep | None") -> tuple[int | torch.Tensor, int]:
        return (0, 0) if keep is None else keep

    @staticmethod
    def in_memory(keep: "Keep | None") -> bool:
        return keep is not None and isinstance(keep.seed, torch.Tensor)


def draw_mask(seed: int | torch.Tensor, n_tokens: int, d_in: int, dropout_p: float, device: torch.device) -> Keep:
    """Twin of ``reference.philox_mask``: the kernels make the mask where they need it."""
    return Keep(seed, round((1 << 16) * dropout_p))


def rows(tensor: torch.Tensor) -> torch.Tensor:
    """A matrix whose rows are contiguous; any leading dimension passes, anything else is copied."""
    return tensor if tensor.stride(1) == 1 or tensor.shape[1] == 1 else tensor.contiguous()


def check_square(name: str, matrices: torch.Tensor) -> tuple[int, int]:
    """n and r of float32 (n, r, r), r from 1 to ``LARGEST_RANK``."""
    n, *sides = matrices.shape
    if len(sides) != 2 or sides[0] != sides[1] or not 1 <= sides[0] <= LARGEST_RANK or matrices.dtype != torch.float32:
        raise ValueError(
            f"lora_fast: {name}: expected float32 (n, r, r), r from 1 to {LARGEST_RANK}, "
            f"got {matrices.dtype} {tuple(matrices.shape)}"
        )
    return n, sides[0]


def check_tensor(name: str, tensor: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if tuple(tensor.shape) != shape or tensor.dtype != dtype or not tensor.is_contiguous():
        raise ValueError(
            f"lora_fast: {name}: expected contiguous {dtype} {shape}, got {tensor.dtype} {tuple(tensor.shape)}"
        )


def on_device(tensor: torch.Tensor):
    """Launches go to the tensor's device, whichever is current."""
    if tensor.device.type != "cuda" or tensor.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(tensor.device)


def precision(tensor: torch.Tensor) -> str:
    """Of products: float32 follows torch's own setting (``torch.backends.cuda.matmul.allow_tf32``)."""
    return "tf32" if tensor.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"
