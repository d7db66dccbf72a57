"""Single modules of transformers' experts with PEFT's adapters on their parameters, and calls of them."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

E, TOP_K, R, HIDDEN, INNER = 6, 2, 3, 16, 24
CLASSES = {  # module in transformers.models, class, adapted parameters
    "gated": ("qwen3_moe", "Qwen3MoeExperts", ("gate_up_proj", "down_proj")),
    "transposed with bias": ("gpt_oss", "GptOssExperts", ("gate_up_proj", "down_proj")),
    "without gate": ("nemotron_h", "NemotronHExperts", ("up_proj", "down_proj")),
    "with norm": ("muse_spark", "MuseSparkExperts", ("gate_up_proj", "down_proj")),
}


def experts(kind: str, implementation: str = "eager", dtype: torch.dtype = torch.float64) -> nn.Module:
    """Returns a module of experts with random weights, as transformers makes it from a config."""
    home, name, _ = CLASSES[kind]
    modeling = pytest.importorskip(f"transformers.models.{home}.modeling_{home}")
    config = SimpleNamespace(
        num_experts=E, num_local_experts=E, n_routed_experts=E, hidden_size=HIDDEN, moe_hidden_size=HIDDEN,
        moe_latent_size=None, intermediate_size=INNER, moe_intermediate_size=INNER, hidden_act="silu",
        mlp_hidden_act="silu", post_norm_eps=1e-6, swiglu_alpha=1.7, swiglu_limit=7.0,
        _experts_implementation=implementation,
    )  # fmt: skip
    torch.manual_seed(0)
    module = getattr(modeling, name)(config)
    if not hasattr(module, "has_gate" if kind == "without gate" else "config"):
        pytest.skip("a transformers without such experts")
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module.to(dtype)


def adapted(module: nn.Module, parameters: tuple[str, ...], r: int = R, adapter: torch.dtype | None = None):
    """Returns a PeftModel that holds the module as ``experts``, with random factors."""
    import peft

    config = peft.LoraConfig(
        r=r, lora_alpha=2 * r, target_modules=[], target_parameters=[f"experts.{name}" for name in parameters]
    )
    model = peft.get_peft_model(nn.ModuleDict({"experts": module}), config)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3)
            parameter.data = parameter.data.to(adapter or parameter.dtype)
    return model


def wrapper_of(model: nn.Module) -> nn.Module:
    """Returns the outermost wrapper."""
    return model.base_model.model["experts"]


def routed(tokens: int = 10, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Returns x, the experts of each token, of which the last expert has none, and the routing weights."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(tokens, HIDDEN, generator=generator).to(dtype)
    index = torch.stack([torch.randperm(E - 1, generator=generator)[:TOP_K] for _ in range(tokens)])
    return x, index, torch.rand(tokens, TOP_K, generator=generator).to(dtype)


def results(model: nn.Module, x: Tensor, index: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """Returns y and the gradients of x, of the routing weights and of all trained parameters."""
    x, weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
    model.zero_grad()
    y = wrapper_of(model)(x, index, weights)
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=torch.float64).sin().view(y.shape).to(y.dtype))
    trained = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    return {"y": y.detach(), "dx": x.grad, "dweights": weights.grad} | trained
