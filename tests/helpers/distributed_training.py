"""The processes of tests/layers/test_distributed.py; a module that a spawned process can import."""

import copy
import gc
import os
import weakref

import torch
import torch.distributed as dist
from torch import nn

import lora_fast as lf
from lora_fast.layers.find import bare_name

WORLD = 2
CONFIGS = (lf.LoRAConfig(r=4, alpha=8), lf.NBLoRAConfig(r=4), lf.SingLoRAConfig(r=4, ramp_steps=0))


def build(config) -> nn.Module:
    """Returns a small injected model whose adapters are not 0."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
    lf.inject_(model, config)
    for layer in (model[0], model[2]):
        nn.init.normal_(getattr(layer, (*layer.TRAINABLE, layer.TRAINABLE[0])[1]), std=0.1)  # b, or the one matrix
    return model


def wrap(model: nn.Module, kind: str, nested: bool = True) -> nn.Module:
    """Returns the model under DDP, under FSDP1 (with ``nested`` each layer by itself) or, sharded in place, under
    FSDP2."""
    if kind == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    if kind == "fsdp1":
        from torch.distributed.fsdp import FullyShardedDataParallel
        from torch.distributed.fsdp.wrap import ModuleWrapPolicy

        policy = ModuleWrapPolicy({type(model[0])}) if nested else None
        settings = {"use_orig_params": True, "device_id": torch.device("cpu"), "auto_wrap_policy": policy}
        return FullyShardedDataParallel(model, **settings)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (WORLD,))
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=mesh)
    return model


class Attention(nn.Module):
    """Three layers of one x, which become a group."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(16, 16), nn.Linear(16, 8), nn.Linear(16, 8)

    def forward(self, x):
        return self.q(x) * torch.cat((self.k(x), self.v(x).tanh()), -1)


def train_a_group(rank: int, kind: str, nested: bool) -> None:
    """Trains a model whose layers share an input, sharded as a whole or, with ``nested``, layer by layer as well."""
    torch.manual_seed(0)
    alone, x = nn.Sequential(Attention()), torch.randn(8, 16, generator=torch.Generator().manual_seed(1))
    lf.inject_(alone, lf.LoRAConfig(r=4, alpha=8))
    for name, p in alone.named_parameters():
        if name.endswith("lora_B"):
            nn.init.normal_(p, std=0.1)
    distributed = copy.deepcopy(alone)
    if kind == "fsdp2":
        from torch.distributed.fsdp import fully_shard

        layers = [distributed[0].q, distributed[0].k, distributed[0].v] if nested else []
        for module in (*layers, distributed[0], distributed):
            fully_shard(module)
    elif kind == "fsdp1":  # which frees a layer's weights after its backward
        from torch.distributed.fsdp import FullyShardedDataParallel
        from torch.distributed.fsdp.wrap import ModuleWrapPolicy

        policy = ModuleWrapPolicy({lf.LoRALinear}) if nested else None
        place = {"use_orig_params": True, "device_id": torch.device("cpu")}
        distributed = FullyShardedDataParallel(distributed, auto_wrap_policy=policy, **place)
    else:
        distributed = nn.parallel.DistributedDataParallel(distributed)
    trained = [[p for p in model.parameters() if p.requires_grad] for model in (alone, distributed)]
    for _ in range(3):  # the first one finds the group
        alone(x).pow(2).mean().backward()
        distributed(x.chunk(WORLD)[rank]).pow(2).mean().backward()
        with torch.no_grad():
            torch.testing.assert_close(distributed(x), alone(x))
        for expected, p in zip(*trained, strict=True):
            if kind != "fsdp1":  # whose gradients are parts of flat ones
                gradient = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
                torch.testing.assert_close(gradient, expected.grad, rtol=1e-5, atol=1e-7)
            p.grad = expected.grad = None
    assert lf.groups(alone).groups == [("0.q", "0.k", "0.v")]
    if kind != "fsdp1" and not nested:
        assert len(lf.groups(distributed).groups[0]) == 3, lf.groups(distributed)


def worker(rank: int, kind: str, folder: str) -> None:
    """Trains every config, then ends the process. A failed assertion leaves before that, as an exception.

    The process ends by `os._exit`, since torch keeps gloo's threads after the process group is destroyed. A thread
    that frees its last tensor while Python shuts down would abort the process (pytorch pull request 179291).
    """
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/{kind}", rank=rank, world_size=WORLD)
    for config in CONFIGS if kind != "fsdp1" else ():
        train(rank, kind, config)
    for nested in (False, True)[: 1 + (kind != "ddp")]:
        train_a_group(rank, kind, nested)
    for config in CONFIGS:
        for nested in (True, False) if kind == "fsdp1" else (True,):
            train_by_loraadamw(rank, kind, config, nested)
    dist.destroy_process_group()
    os._exit(0)


def train(rank: int, kind: str, config) -> None:
    """Trains for two steps, each with an evaluation before it, and compares with training in one process."""
    alone, x = build(config), torch.randn(8, 16, generator=torch.Generator().manual_seed(1))
    distributed = wrap(copy.deepcopy(alone), kind)
    trained = [[p for p in model.parameters() if p.requires_grad] for model in (alone, distributed)]
    optimizers = [torch.optim.SGD(parameters, lr=0.01) for parameters in trained]
    for _ in range(2):
        with torch.no_grad():
            torch.testing.assert_close(distributed(x), alone(x))
        alone(x).pow(2).mean().backward()
        distributed(x.chunk(WORLD)[rank]).pow(2).mean().backward()
        for expected, p in zip(*trained, strict=True):
            gradient = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
            error = (gradient - expected.grad).norm()
            assert error <= 16 * torch.finfo(expected.dtype).eps * expected.grad.norm()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def train_by_loraadamw(rank: int, kind: str, config, nested: bool) -> None:
    """Trains with LoRAAdamW and compares with one process. Under FSDP2 the optimizer is made before the model is
    sharded, and its groups get the sharded parameters then, as accelerate does it. There, methods are refused by
    name."""
    alone, x = build(config), torch.randn(8, 16, generator=torch.Generator().manual_seed(1))
    pairing = [lf.methods.ILoRA()] if isinstance(config, lf.LoRAConfig) else []
    distributed = copy.deepcopy(alone)
    methods = pairing if kind == "ddp" else []
    optimizers = [lf.optim.LoRAAdamW(model, lr=1e-2, methods=methods) for model in (alone, distributed)]
    refused = lf.optim.LoRAAdamW(distributed, methods=pairing)
    names = {p: name for name, p in distributed.named_parameters()}
    originals = {name: weakref.ref(p) for p, name in names.items()}
    orders = [[[names[p] for p in group["params"]] for group in x.param_groups] for x in (optimizers[1], refused)]
    del names
    if kind == "fsdp2":
        for optimizer in (optimizers[1], refused):
            for group in optimizer.param_groups:
                group["params"] = [torch.empty(1) for _ in group["params"]]
    distributed = wrap(distributed, kind, nested)
    parameters = {bare_name(name): p for name, p in distributed.named_parameters()}
    for optimizer, order in zip((optimizers[1], refused), orders, strict=True):
        for group, members in zip(optimizer.param_groups, order, strict=True):
            group["params"] = [parameters[name] for name in members]
    for _ in range(2):
        alone(x).pow(2).mean().backward()
        distributed(x.chunk(WORLD)[rank]).pow(2).mean().backward()
        if pairing and kind != "ddp":
            try:
                refused.step()
            except lf.ArgumentError as error:
                assert "lora_A" in str(error)
            else:
                raise AssertionError("methods on sharded parameters: expected an ArgumentError")
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    del refused
    gc.collect()
    if kind == "fsdp2":
        assert [name for name, p in originals.items() if p() is not None and p().untyped_storage().nbytes()] == []
    with torch.no_grad():
        torch.testing.assert_close(distributed(x), alone(x), rtol=1e-4, atol=1e-5)
