"""Kernels run natively on a CUDA machine and through Triton's interpreter elsewhere; no test needs a network."""

import os

import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
    from lora_fast.kernels import interpreted

    interpreted.patch_once()
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)
