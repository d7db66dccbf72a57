"""Two processes over gloo: an injected model under DDP and FSDP2 has the gradients of one process."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

import lora_fast as lf

WORLD = 2


def model() -> nn.Module:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
    lf.inject_(made, lf.LoRAConfig(r=4, alpha=8))
    for layer in (made[0], made[2]):
        nn.init.normal_(layer.lora_B, std=0.1)
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
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/{kind}", rank=rank, world_size=WORLD)
    alone, x = model(), torch.randn(8, 16, generator=torch.Generator().manual_seed(1))
    sharded = wrapped(copy.deepcopy(alone), kind)
    alone(x).pow(2).mean().backward()
    sharded(x.chunk(WORLD)[rank]).pow(2).mean().backward()
    expected = [p.grad for p in alone.parameters() if p.requires_grad]
    got = [p.grad for p in sharded.parameters() if p.requires_grad]
    for gradient, true in zip(got, expected, strict=True):
        gradient = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
        assert (gradient - true).norm() <= 8 * torch.finfo(true.dtype).eps * true.norm()
    dist.destroy_process_group()


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_gradients_are_those_of_one_process(kind, tmp_path):
    """The assertions are the worker's: mp.spawn raises what fails there."""
    mp.spawn(worker, (kind, str(tmp_path)), nprocs=WORLD)
