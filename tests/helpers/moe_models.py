"""Tiny mixtures of experts of transformers with PEFT's adapters on the experts' parameters."""

import torch
import transformers
from tiny import VOCABULARY, fill
from torch import nn

E, R = 6, 4
SIZE = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "num_experts_per_tok": 2, "use_cache": False,
    "pad_token_id": None,
}  # fmt: skip
MODELS = {  # class, what its config adds
    "qwen3_moe": ("Qwen3Moe", {"moe_intermediate_size": 24, "num_experts": E, "head_dim": 8}),
    "mixtral": ("Mixtral", {"intermediate_size": 24, "num_local_experts": E}),
    "gpt_oss": ("GptOss", {"intermediate_size": 24, "num_local_experts": E, "head_dim": 8}),
    "olmoe": ("Olmoe", {"intermediate_size": 24, "num_experts": E}),
    "deepseek_v3": (
        "DeepseekV3",
        {"moe_intermediate_size": 24, "intermediate_size": 48, "n_routed_experts": E, "first_k_dense_replace": 0}
        | {"n_group": 2, "topk_group": 1, "q_lora_rank": 16, "kv_lora_rank": 8, "qk_rope_head_dim": 8}
        | {"qk_nope_head_dim": 8, "v_head_dim": 8, "num_key_value_heads": 4},
    ),
    "granitemoe": ("GraniteMoe", {"intermediate_size": 24, "num_local_experts": E}),
    "jetmoe": ("JetMoe", {"intermediate_size": 24, "num_local_experts": E, "kv_channels": 8}),
}


def base_model(name: str, implementation="eager", dtype=torch.float32, **options) -> nn.Module:
    kind, config = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**(SIZE | config | options))
    config._experts_implementation = implementation
    return getattr(transformers, f"{kind}ForCausalLM")(config).to(dtype)


def experts_of(model: nn.Module) -> list[str]:
    """Returns the names of the parameters of experts, as ``target_parameters`` takes them."""
    return sorted({".".join(name.split(".")[-2:]) for name, p in model.named_parameters() if p.dim() == 3})


def moe_model(name: str, implementation="eager", dtype=torch.float32, modules=(), **options):
    """Returns a PeftModel with random factors for all experts, and for linear layers if they are named."""
    import peft

    base = base_model(name, implementation, dtype, **options)
    config = peft.LoraConfig(r=R, lora_alpha=2 * R, target_modules=list(modules), target_parameters=experts_of(base))
    return fill(peft.get_peft_model(base, config))
