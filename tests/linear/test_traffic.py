"""Counts the bytes of the thin passes and the launches of a layer exactly, in the interpreter."""

import pytest
import torch
from launching import size

import lora_fast as lf

if torch.cuda.is_available():
    pytest.skip("counted by the interpreter, which a CUDA machine does not use", allow_module_level=True)

from lora_fast.kernels import linear, tiles
from lora_fast.kernels.inspection import interpreter

N_TOKENS, D, R = 8192, 4096, 16


def test_thin_passes_move_at_most_1_3_times_their_operands():
    """The count includes partial sums and factors that are read again (16-bit adapters, r = 16)."""
    x, thin = torch.zeros(N_TOKENS, D, dtype=torch.float16), torch.zeros(N_TOKENS, R, dtype=torch.float16)
    a, b = torch.zeros(R, D, dtype=torch.float16), torch.zeros(D, R, dtype=torch.float16)
    runs = {
        "project": (lambda: linear.project(x, a), size(x, a, thin)),
        "grad_s_b": (lambda: linear.grad_s_b(x, thin, b, 1.0), size(x, thin, b, thin, b)),
        "grad_a": (lambda: linear.grad_a(x, thin, a), size(x, thin, a)),
    }
    for name, (run, minimum) in runs.items():
        with tiles.assume(arch=90), interpreter.traffic() as counted:
            run()
        assert minimum <= counted.total <= 1.3 * minimum, f"{name}: {counted.total / minimum:.3f}"


def test_masked_elements_are_not_counted():
    x, a = torch.zeros(3, 5), torch.zeros(2, 5)
    with interpreter.traffic() as counted:
        linear.project(x, a)
    assert (counted.loaded, counted.stored) == (size(x, a), 3 * 2 * 4)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("strategy, forward, backward", [("fused", 2, 5), ("cublas", 2, 5)])
def test_layer_launches_two_kernels_forward_and_five_backward(strategy, forward, backward, dropout):
    """Only Triton kernels are counted. cuBLAS adds one launch forward and one backward."""
    module = lf.LoRALinear(640, 640, r=16, alpha=16, dropout=dropout, dtype=torch.float16)
    x = torch.randn(1024, 640, dtype=torch.float16, requires_grad=True)
    with lf.set_backend("triton"), tiles.assume(arch=90, strategy=strategy, thin="pass"):
        with interpreter.traffic() as counted:
            y = module(x)
        assert len(counted.launches) == forward
        with interpreter.traffic() as counted:
            y.backward(torch.ones_like(y))
        assert len(counted.launches) == backward


def test_backward_of_a_frozen_input_launches_no_gemm():
    module = lf.LoRALinear(64, 64, r=4, alpha=4, dtype=torch.float16)
    with lf.set_backend("triton"), tiles.assume(strategy="fused"):
        y = module(torch.randn(32, 64, dtype=torch.float16))
        with interpreter.traffic() as counted:
            y.sum().backward()
    assert "lora_linear_kernel" not in counted.launches and "lora_grad_a_kernel" in counted.launches
