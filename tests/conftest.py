"""Kernels run natively on a CUDA machine and through Triton's interpreter elsewhere; no test needs a network."""

import os

import numpy
import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
INTERPRETED = (
    not torch.cuda.is_available() and "LORA_FAST_STUB_ARCH" not in os.environ
)  # bench/gpu_sections/compile_cache.py's
if INTERPRETED:
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
    from lora_fast.kernels.inspection import interpreter

    interpreter.patch_once()
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    """Triton 3.6's interpreter makes numbers of arrays of one element, which numpy refuses from 2.4 on."""
    import triton

    major_minor = lambda version: tuple(map(int, version.split(".")[:2]))
    if INTERPRETED and major_minor(triton.__version__) < (3, 7) and major_minor(numpy.__version__) >= (2, 4):
        reason = f"Triton {triton.__version__} cannot interpret with numpy {numpy.__version__}: install numpy<2.4"
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason=reason))
