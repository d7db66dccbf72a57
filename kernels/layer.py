"""The layer's ops under one roof, with the signatures of their twins in ``lora_fast.reference``."""

from .grads import grad_a, grad_s_b
from .launch import draw_mask
from .linear import grad_x, linear
from .project import project

__all__ = ["draw_mask", "grad_a", "grad_s_b", "grad_x", "linear", "project"]
