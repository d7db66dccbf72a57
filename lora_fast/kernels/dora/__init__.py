"""DoRA (Liu et al., arXiv 2402.09353): the norms of the rows and the columns' scale (columns.py), and a whole layer,
whose scale is in the GEMM's update and in the pass over dy (layer.py)."""

from .columns import column_scale, column_scale_backward, weight_norms
from .layer import backward, forward

__all__ = ["backward", "column_scale", "column_scale_backward", "forward", "weight_norms"]
