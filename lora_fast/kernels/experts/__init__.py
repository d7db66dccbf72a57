"""The thin products of LoRA on the experts of a mixture: rows are sorted by expert, and each expert has its own pair.

``offsets`` (n_experts,), int32 on the device, has the end of each expert's rows, so that expert e has the rows
``offsets[e - 1]`` … ``offsets[e]``. The host never reads it: grids depend on the numbers of rows and experts alone
(kernels/segments.py), and an op is one launch however many experts there are and wherever the rows go. Rows from
``offsets[-1]`` on belong to no expert.
"""

from .gradients import grad_factors
from .products import add_product, grad_s, project

__all__ = ["add_product", "grad_factors", "grad_s", "project"]
