"""The interpreter's patches, which save time: kernels give the same bits with them and without."""

import hashlib
import os
import subprocess
import sys

import pytest

DIGEST = """
import hashlib, sys, torch
import lora_fast as lf
from lora_fast import methods as M

if sys.argv[1] == "patched":
    from lora_fast.kernels.inspection import interpreter
    interpreter.patch_once()
torch.set_num_threads(1)
torch.manual_seed(0)
digest = hashlib.sha256()


def add(*tensors):
    for tensor in tensors:
        digest.update(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())


with lf.set_backend("triton"):
    for dtype, adapter in ((torch.bfloat16, torch.float32), (torch.float32, torch.float32)):
        x, weight = torch.randn(33, 40, dtype=dtype).requires_grad_(), torch.randn(48, 40, dtype=dtype)
        a, b = torch.randn(5, 40, dtype=adapter).requires_grad_(), torch.randn(48, 5, dtype=adapter).requires_grad_()
        y = lf.functional.lora_linear(x, weight, None, a, b, 2.0, 0.3, seed=7)
        add(y, *torch.autograd.grad(y.square().sum(), [x, a, b]))
    layer = lf.NBLoRALinear(24, 20, r=3, bound=0.5)
    layer(torch.randn(4, 24)).square().sum().backward()
    add(*(p.grad for p in layer.parameters() if p.requires_grad))
    for methods in ([M.ILoRA()], [M.ScaLoRA(interval=1)], [M.LoRAMuon()]):
        factors = torch.nn.Parameter(torch.randn(3, 24)), torch.nn.Parameter(torch.randn(20, 3))
        for p in factors:
            p.grad = torch.randn_like(p)
        lf.optim.LoRAAdamW([(*factors, 2.0, torch.randn(20, 24))], lr=1e-2, methods=methods).step()
        add(*factors)
print(digest.hexdigest())
"""


def run(how: str) -> str:
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", DIGEST, how], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout.strip()


@pytest.mark.skipif(sys.platform != "linux", reason="Triton needs Linux")
def test_patched_interpreter_gives_the_same_bits():
    patched = run("patched")
    assert len(patched) == 2 * hashlib.sha256().digest_size and patched == run("unpatched")
