"""Models in torch's wrappers, whose optimizer states tests/test_optim_wrapped.py loads without them and the other way
round; a module that a spawned process can import."""

import copy
import itertools
import os

import peft
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint import state_dict as dcp

import lora_fast as lf
from lora_fast import methods as M

KINDS = ("LoRA", "SingLoRA", "PEFT")
METHODS = ([], [M.ILoRA(), M.LoRAPlus(2.0)])


def build(kind: str) -> nn.Module:
    """Returns a small model with adapters that are not 0, and with a trained LayerNorm."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4), nn.LayerNorm(4))
    if kind == "PEFT":
        settings = {"target_modules": ["0", "2"], "modules_to_save": ["3"], "init_lora_weights": False}
        model = peft.get_peft_model(model, peft.LoraConfig(r=4, **settings))
        lf.fuse_(model)
        return model
    config = {
        "LoRA": lf.LoRAConfig(r=4),
        "SingLoRA": lf.SingLoRAConfig(r=4, ramp_steps=0),
    }[kind]
    lf.inject_(model, config)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.1)
    model[3].requires_grad_(True)
    return model


def _layers(model: nn.Module) -> nn.Sequential:
    return next(module for module in model.modules() if type(module) is nn.Sequential)


def checkpointed(model: nn.Module) -> nn.Module:
    layers = _layers(model)
    layers[0], layers[2] = checkpoint_wrapper(layers[0]), checkpoint_wrapper(layers[2])
    return model


def fsdp1(model: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import FullyShardedDataParallel

    return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))


def fsdp2(model: nn.Module) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh, layers = init_device_mesh("cpu", (1,)), _layers(model)
    for module in (layers[0], layers[2], model):
        fully_shard(module, mesh=mesh)
    return model


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")


WRAPPERS = {
    "compile": compiled,
    "DDP": nn.parallel.DistributedDataParallel,
    "DataParallel": nn.DataParallel,
    "checkpoint_wrapper": checkpointed,
    "FSDP1": fsdp1,
    "FSDP2": fsdp2,
    "all": lambda model: nn.parallel.DistributedDataParallel(compiled(checkpointed(model))),
}


def alone(model: nn.Module) -> nn.Module:
    return model


def train(model: nn.Module, optimizer, steps: range) -> None:
    for step in steps:
        x = torch.randn(5, 8, generator=torch.Generator().manual_seed(step))
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def values(model: nn.Module) -> list[torch.Tensor]:
    """Returns copies of all parameters, whole."""
    return [getattr(p, "full_tensor", lambda p=p: p)().detach().clone() for p in model.parameters()]


def set_values(model: nn.Module, wanted: list[torch.Tensor]) -> None:
    with torch.no_grad():
        for p, value in zip(model.parameters(), wanted, strict=True):
            (p.to_local() if hasattr(p, "to_local") else p).copy_(value)


def by_load_state_dict(source, optimizer, model, other) -> None:
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def by_dcp(source, optimizer, model, other) -> None:
    """The helpers of torch.distributed.checkpoint, which rename parameters and take an optimizer's first step."""
    options = dcp.StateDictOptions(full_state_dict=True)
    state = copy.deepcopy(dcp.get_optimizer_state_dict(source, optimizer, options=options))
    dcp.set_optimizer_state_dict(model, other, state, options=options)


def check(case: str, kind: str, methods: list, wraps: tuple, transfer) -> None:
    """Trains a model for two steps, loads its optimizer's state into another's, and asserts that both take the same two
    steps then."""
    source, model = (wrap(build(kind)) for wrap in wraps)
    optimizer, other = (lf.optim.LoRAAdamW(m, lr=1e-2, methods=methods) for m in (source, model))
    train(source, optimizer, range(2))
    names = [group["param_names"] for group in optimizer.param_groups]
    assert names == [group["param_names"] for group in lf.optim.LoRAAdamW(build(kind), methods=methods).param_groups], (
        case
    )
    set_values(model, values(source))
    transfer(source, optimizer, model, other)
    for trained, steps in ((source, optimizer), (model, other)):
        train(trained, steps, range(2, 4))
    for p, q in zip(values(source), values(model), strict=True):
        assert torch.equal(p, q), case


def worker(rank: int, folder: str) -> None:
    """Checks every wrapper. The process ends by os._exit, as in distributed_training.py."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=1)
    for kind, methods, wrapper in itertools.product(KINDS, METHODS, WRAPPERS):
        if methods and (kind == "SingLoRA" or wrapper.startswith("FSDP")):  # these take plain AdamW
            continue
        for wraps in ((WRAPPERS[wrapper], alone), (alone, WRAPPERS[wrapper])):
            check(f"{kind} {methods} {wrapper}", kind, methods, wraps, by_load_state_dict)
            if (
                kind == "PEFT" and wrapper != "DataParallel"
            ):  # its prefix is part of the names that torch's helpers give
                check(f"{kind} {methods} {wrapper} DCP", kind, methods, wraps, by_dcp)
    dist.destroy_process_group()
    os._exit(0)
