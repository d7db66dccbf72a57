"""Tile configurations of the grouped kernels, as tiles.py is of the layer's: rank class → one row of one table.

The rows compile without spills for sm_80, sm_90 and sm_100 (tests/test_step_kernels.py); which are fastest is not
verified on a GPU. ``chunk`` is how many rows of d a program owns: it decides the order of summation, so it must not
depend on the device.
"""

from typing import NamedTuple

import triton


class Tile(NamedTuple):
    d: int  # rows of d in one step
    r: int  # rank columns of one tile
    chunk: int  # rows of d that a program walks
    warps: int
    stages: int


# op → rows (largest rank class, d, r, chunk, warps, stages)
TABLE = {
    "gram": [
        (16, 64, 16, 2048, 4, 3),
        (32, 64, 32, 4096, 4, 3),
        (64, 16, 64, 8192, 8, 2),
        (256, 16, 64, 8192, 8, 2),
    ],
    "step": [
        (1, 2048, 1, 4096, 8, 1),
        (16, 128, 16, 512, 8, 1),
        (32, 64, 32, 512, 8, 1),
        (64, 32, 64, 1024, 8, 1),
        (128, 16, 128, 1024, 8, 1),
        (256, 16, 256, 1024, 8, 1),
    ],
}


def tile(op: str, r: int) -> Tile:
    """``r``: the largest rank of the launch; 1 only for elementwise work (products need 16 columns)."""
    rank_class = triton.next_power_of_2(r)
    return Tile(*next(row for row in TABLE[op] if rank_class <= row[0])[1:])
