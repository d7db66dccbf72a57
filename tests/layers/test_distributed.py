"""Two processes over gloo: an injected model under DDP and FSDP2 has the gradients of one process."""

import copy
import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

import lora_fast as lf

WORLD = 2
CONFIGS = (lf.LoRAConfig(r=4, alpha=8), lf.NBLoRAConfig(r=4), lf.SingLoRAConfig(r=4, ramp_steps=0))


def model(config) -> nn.Module:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
    lf.inject_(made, config)
    for layer in (made[0], made[2]):
        nn.init.normal_(getattr(layer, (*layer.TRAINABLE, layer.TRAINABLE[0])[1]), std=0.1)  # b, or the one matrix
    return made


def wrapped(made: nn.Module, kind: str) -> nn.Module:
    if kind == "ddp":
        return nn.parallel.DistributedDataParallel(made)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (WORLD,))
    for layer in (made[0], made[2], made):
        fully_shard(layer, mesh=mesh)
    return made


def worker(rank: int, kind: str, folder: str) -> None:
    """Trains every config, then ends the process. A failed assertion leaves before that, as an exception.

    The process ends by `os._exit`, since torch keeps gloo's threads after the process group is destroyed. A thread
    that frees its last tensor while Python shuts down would abort the process (pytorch pull request 179291).
    """
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/{kind}", rank=rank, world_size=WORLD)
    for config in CONFIGS:
        train(rank, kind, config)
    dist.destroy_process_group()
    os._exit(0)


def train(rank: int, kind: str, config) -> None:
    """Two steps, each with an evaluation before it."""
    alone, x = model(config), torch.randn(8, 16, generator=torch.Generator().manual_seed(1))
    sharded = wrapped(copy.deepcopy(alone), kind)
    trained = [[p for p in made.parameters() if p.requires_grad] for made in (alone, sharded)]
    optimizers = [torch.optim.SGD(parameters, lr=0.01) for parameters in trained]
    for _ in range(2):
        with torch.no_grad():
            torch.testing.assert_close(sharded(x), alone(x))
        alone(x).pow(2).mean().backward()
        sharded(x.chunk(WORLD)[rank]).pow(2).mean().backward()
        for true, p in zip(*trained, strict=True):
            gradient = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
            assert (gradient - true.grad).norm() <= 16 * torch.finfo(true.dtype).eps * true.grad.norm()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_gradients_are_those_of_one_process(kind, tmp_path):
    """The assertions are the worker's: mp.spawn raises what fails there."""
    mp.spawn(worker, (kind, str(tmp_path)), nprocs=WORLD)
