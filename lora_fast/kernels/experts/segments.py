"""Finds the rows that a program works on from the ends of the experts' rows, which only the device knows.

Each expert has ``end // BLOCK_T - begin // BLOCK_T + 1`` consecutive programs for its rows ``begin`` … ``end``. This is
at least the number of its tiles of BLOCK_T rows, so at most one program of an expert has no rows. The first of them is
program ``begin // BLOCK_T + expert``, and n_experts experts have ``n_rows // BLOCK_T + n_experts`` programs at most.
No sum over the experts is therefore needed, neither on the host nor in a program.
"""

import triton
import triton.language as tl


@triton.jit
def ends_at(offsets, i_expert, n_rows, n_experts):
    """Returns where the rows of these experts end. The rows that belong to no expert are those of expert
    ``n_experts``. A wrong offset leads to no access beyond the rows."""
    return tl.minimum(tl.load(offsets + i_expert, mask=i_expert < n_experts, other=n_rows), n_rows)


@triton.jit
def begins_at(offsets, i_expert, n_rows):
    """Returns where the rows of an expert begin."""
    return tl.minimum(tl.load(offsets + i_expert - 1, mask=i_expert > 0, other=0), n_rows)


@triton.jit
def tile_of(offsets, i_program, n_rows, n_experts, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr):
    """Returns the expert of a program, the first row of its tile, and the end of the expert's rows. There is no tile if
    the first row is not before that end. BLOCK_E is at least n_experts."""
    i_e = tl.arange(0, BLOCK_E)
    b_next = ends_at(offsets, i_e, n_rows, n_experts) // BLOCK_T + i_e + 1  # the first program of the next expert
    i_expert = tl.sum(((b_next <= i_program) & (i_e < n_experts)).to(tl.int32))
    begin, end = begins_at(offsets, i_expert, n_rows), ends_at(offsets, i_expert, n_rows, n_experts)
    i_tile = i_program - (begin // BLOCK_T + i_expert)
    return i_expert.to(tl.int64), begin.to(tl.int64) + i_tile * BLOCK_T, end


def programs(n_rows: int, n_segments: int, block_t: int) -> int:
    """Returns the number of programs for the tiles of this many segments: the experts, and the rows of no expert if
    they are needed."""
    return n_rows // block_t + n_segments
