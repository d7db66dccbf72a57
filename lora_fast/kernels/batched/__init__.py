"""The thin products of a batch whose rows belong to several LoRA adapters of one layer, as a server computes it.

Table     int64 (n_adapters, 4) on the device, the C struct {const void *a, *b; int64_t r; float scaling, reserved;}:
          the addresses of a (r, d_in) and b (d_out, r), which are contiguous, the rank, and the bits of the scaling in
          the low half of the last number. The ranks may differ; all factors have one dtype.
Rows      ``rows`` int32 (n_rows,) has the numbers of x's rows, sorted by adapter, and ``ends`` int32 (n_adapters,) the
          end of each adapter's range in ``rows``. From ``ends[-1]`` on rows belong to no adapter: they are neither read
          nor written.
Grid      depends on n_rows and n_adapters alone (kernels/segments.py). A CUDA graph can therefore be replayed with
          other rows, ends and adapters by writing these tensors, as long as no rank is above the one of its capture.
"""

from .products import add_product, project
from .table import adapter_table, sorted_rows

__all__ = ["adapter_table", "add_product", "project", "sorted_rows"]
