"""Pairs of one optimizer whose devices differ in what they can run, stood in for by the pairs themselves."""

import pytest
import torch
from adapter_pairs import pairs, train

from lora_fast import backend, methods
from lora_fast.batches.grouped import GroupedBatch
from lora_fast.batches.stacked import StackedBatch
from lora_fast.optim import LoRAAdamW

METHODS = {"adamw": [], "ilora": [methods.ILoRA()], "scalora": [methods.ScaLoRA(interval=1, rounding="nearest")]}


@pytest.mark.parametrize("name", METHODS)
def test_pairs_on_an_old_gpu_run_plain_torch_beside_those_that_run_kernels(monkeypatch, name):
    expected, chosen = pairs(), pairs()
    with backend.set_backend("torch"):
        train(LoRAAdamW(expected, methods=METHODS[name]), expected, 2)
    on_old_gpu = {id(tensor) for pair in chosen[:2] for tensor in pair if isinstance(tensor, torch.Tensor)}
    monkeypatch.setattr(backend, "uses_triton", lambda tensor: id(tensor) not in on_old_gpu)
    optimizer = LoRAAdamW(chosen, methods=METHODS[name])
    train(optimizer, chosen, 2)
    kinds = set(map(type, optimizer._batches))
    assert GroupedBatch in kinds and (StackedBatch in kinds) is (name != "adamw")
    for (a, b, *_), (exact_a, exact_b, *_) in zip(chosen, expected, strict=True):
        assert (a - exact_a).norm() < 1e-5 * exact_a.norm() and (b - exact_b).norm() < 1e-5 * exact_b.norm()
