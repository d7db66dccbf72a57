"""Tiny models with PEFT adapters on one parameter of many experts."""

import copy

import pytest
import torch
from torch import nn

from lora_fast import methods as M

peft = pytest.importorskip("peft")


E, R, D_OUT, D_IN = 4, 4, 20, 12


METHODS = {
    "adamw": [],
    "lora+": [M.LoRAPlus(4.0)],
    "scale-reg": [M.ScaleReg(lam=0.05)],
    "scale-reg decoupled": [M.ScaleReg(lam=0.05, decoupled=True)],
    "scaled adamw": [M.ScaledAdamW(damping=1e-2)],
    "ilora lora+": [M.ILoRA(lam=2.0), M.LoRAPlus(4.0)],
    "pilora": [M.PiLoRA(lam=1.0, damping=1e-2)],
    "balora": [M.BaLoRA()],
    "balora mv": [M.BaLoRA(every=2, transport="mv")],
    "scalora": [M.ScaLoRA(interval=3)],
    "lora-rite": [M.LoRARITE()],
    "lora-rite ilora": [M.LoRARITE(), M.ILoRA(lam=2.0)],
    "ref-lora": [M.RefLoRA()],
    "lora-muon": [M.LoRAMuon()],
}


ROUNDINGS = ("stochastic", "nearest", "compensated")


both_layouts = pytest.mark.parametrize("is_transposed", [False, True], ids=["(E, out, in)", "(E, in, out)"])


class Experts(nn.Module):
    """A parameter of E matrices, in one of the two layouts that transformers uses."""

    def __init__(self, experts, d_out, d_in, is_transposed, dtype):
        super().__init__()
        self.is_transposed = is_transposed
        shape = (d_in, d_out) if is_transposed else (d_out, d_in)
        self.matrices = nn.Parameter(torch.randn(experts, *shape, dtype=dtype) / 4)

    def forward(self, x):
        return x @ (self.matrices if self.is_transposed else self.matrices.mT)


def experts_model(is_transposed=False, experts=E, r=R, dtype=torch.float64, layers=1, d_out=D_OUT, d_in=D_IN):
    """Returns a PEFT model with random factors, and its wrappers."""
    torch.manual_seed(0)
    config = peft.LoraConfig(r=r, lora_alpha=2 * r, target_modules=[], target_parameters=["experts.matrices"])
    modules = [nn.ModuleDict({"experts": Experts(experts, d_out, d_in, is_transposed, dtype)}) for _ in range(layers)]
    model = peft.get_peft_model(nn.ModuleList(modules), config)
    wrappers = [module for module in model.modules() if type(module).__name__ == "ParamWrapper"]
    for wrapper in wrappers:
        nn.init.normal_(wrapper.lora_A["default"].weight, std=d_in**-0.5)
        nn.init.normal_(wrapper.lora_B["default"].weight, std=0.25)
    return model, wrappers


def directions(wrapper, seed):
    """Returns a random gradient of each expert's weight, (E, d_out, d_in)."""
    generator = torch.Generator().manual_seed(seed)
    shape = (wrapper.num_experts, wrapper.out_features, wrapper.in_features)
    return torch.randn(shape, generator=generator, dtype=wrapper.get_param().dtype)


def set_gradients(wrapper, seed):
    """Sets the factors' gradients by autograd through PEFT's change of the weight."""
    full = directions(wrapper, seed)
    full = full if swaps_features(wrapper) else full.mT
    wrapper.lora_A["default"].weight.grad = wrapper.lora_B["default"].weight.grad = None
    (wrapper.get_delta_weight("default") * full).sum().backward()


def effective(wrapper):
    """Returns W + ΔW in float64, as computed by PEFT."""
    exact = copy.deepcopy(wrapper).double()
    return (exact.get_param() + exact.get_delta_weight("default")).detach()


def factors(wrapper):
    """Returns copies of each expert's (a, b), which PEFT's get_delta_weight multiplies, and the scaling."""
    a, b = (getattr(wrapper, name)["default"].weight.detach() for name in ("lora_A", "lora_B"))
    a = a.reshape(wrapper.num_experts, -1, a.shape[1])
    b = b.reshape(b.shape[0], -1, wrapper.num_experts).permute(2, 0, 1)
    return [(x.clone(), y.clone()) for x, y in zip(a, b, strict=True)], wrapper.scaling["default"]


def matrices(wrapper, x):
    """Returns each expert's (d_out, d_in) matrix of ``x``, the parameter or PEFT's change of it."""
    return x.detach().clone() if swaps_features(wrapper) else x.detach().mT.clone()


def swaps_features(wrapper: nn.Module) -> bool:
    """Returns whether PEFT takes the parameter as (experts, out, in), which only PEFT 0.19 and later do."""
    return getattr(wrapper, "_did_swap_in_out_features", False)
