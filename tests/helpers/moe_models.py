"""Tiny mixtures of experts of transformers with PEFT's adapters on the experts' parameters."""

import torch
import transformers
from tiny import VOCABULARY, fill
from torch import nn

E, TOP_K, R = 6, 2, 4
SIZE = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "num_experts_per_tok": TOP_K, "use_cache": False,
}  # fmt: skip
BOTH = ("gate_up_proj", "down_proj")
MODELS = {  # class, what its config adds, adapted parameters, the modules that hold them
    "qwen3_moe": ("Qwen3Moe", {"moe_intermediate_size": 24, "num_experts": E, "head_dim": 8}, BOTH, "experts"),
    "mixtral": ("Mixtral", {"intermediate_size": 24, "num_local_experts": E}, BOTH, "experts"),
    "gpt_oss": ("GptOss", {"intermediate_size": 24, "num_local_experts": E, "head_dim": 8}, BOTH, "experts"),
    "olmoe": ("Olmoe", {"intermediate_size": 24, "num_experts": E}, BOTH, "experts"),
    "deepseek_v3": (
        "DeepseekV3",
        {"moe_intermediate_size": 24, "intermediate_size": 48, "n_routed_experts": E, "first_k_dense_replace": 0}
        | {"n_group": 2, "topk_group": 1, "q_lora_rank": 16, "kv_lora_rank": 8, "qk_rope_head_dim": 8}
        | {"qk_nope_head_dim": 8, "v_head_dim": 8, "num_key_value_heads": 4},
        BOTH,
        "experts",
    ),
    "granitemoe": ("GraniteMoe", {"intermediate_size": 24, "num_local_experts": E}, BOTH, "experts"),
    "jetmoe": (
        "JetMoe",
        {"intermediate_size": 24, "num_local_experts": E, "kv_channels": 8},
        ("input_linear.weight", "output_linear.weight"),
        "mlp",
    ),
}


def base_model(name: str, implementation="eager", dtype=torch.float32, **options) -> nn.Module:
    kind, config, *_ = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**(SIZE | config | options))
    config._experts_implementation = implementation
    return getattr(transformers, f"{kind}ForCausalLM")(config).to(dtype)


def moe_model(name: str, implementation="eager", dtype=torch.float32, parameters=None, modules=(), **options):
    """Returns a PeftModel with random factors for the experts, and for linear layers if they are named."""
    import peft

    _, _, all_parameters, holder = MODELS[name]
    targets = [f"{holder}.{parameter}" for parameter in parameters or all_parameters]
    config = peft.LoraConfig(r=R, lora_alpha=2 * R, target_modules=list(modules), target_parameters=targets)
    return fill(peft.get_peft_model(base_model(name, implementation, dtype, **options), config))
