"""Finds the rows that a program works on from the ends of the segments, which only the device knows. A segment holds
the rows of one expert, or of one adapter of a batch.

Each segment has ``end // BLOCK_T - begin // BLOCK_T + 1`` consecutive programs for its rows ``begin`` … ``end``. This
is at least the number of its tiles of BLOCK_T rows, so at most one program of a segment has no rows. The first of them
is program ``begin // BLOCK_T + segment``, and n segments have ``n_rows // BLOCK_T + n`` programs at most. No sum over
the segments is therefore needed, neither on the host nor in a program.
"""

import triton
import triton.language as tl


@triton.jit
def ends_at(offsets, i_segment, n_rows, n_segments):
    """Returns where these segments end. The rows that belong to no expert or adapter are segment ``n_segments``. A
    wrong offset leads to no access beyond the rows."""
    return tl.minimum(tl.load(offsets + i_segment, mask=i_segment < n_segments, other=n_rows), n_rows)


@triton.jit
def begins_at(offsets, i_segment, n_rows):
    """Returns where a segment begins."""
    return tl.minimum(tl.load(offsets + i_segment - 1, mask=i_segment > 0, other=0), n_rows)


@triton.jit
def tile_of(offsets, i_program, n_rows, n_segments, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr):
    """Returns the segment of a program, the first row of its tile, and the segment's end. There is no tile if the first
    row is not before that end. BLOCK_E is at least n_segments."""
    i_e = tl.arange(0, BLOCK_E)
    b_next = ends_at(offsets, i_e, n_rows, n_segments) // BLOCK_T + i_e + 1  # the first program of the next segment
    i_segment = tl.sum(((b_next <= i_program) & (i_e < n_segments)).to(tl.int32))
    begin, end = begins_at(offsets, i_segment, n_rows), ends_at(offsets, i_segment, n_rows, n_segments)
    i_tile = i_program - (begin // BLOCK_T + i_segment)
    return i_segment.to(tl.int64), begin.to(tl.int64) + i_tile * BLOCK_T, end


def programs(n_rows: int, n_segments: int, block_t: int) -> int:
    """Returns the number of programs for the tiles of this many segments: those of the experts or adapters, and the
    last one if its rows are needed."""
    return n_rows // block_t + n_segments
