"""Models and configs for each feature of PEFT's LoraConfig, their trained PEFT models, and their outputs."""

import copy
import functools

import torch
from peft import LoraConfig, get_peft_model
from tiny import batch, llama
from torch import nn

import lora_fast as lf

ATTENTION = {"target_modules": ["q_proj", "v_proj"]}
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 97, "pad_token_id": 0}


class Mixed(nn.Module):
    """A convolution and a linear layer with biases."""

    def __init__(self):
        super().__init__()
        self.conv, self.linear = nn.Conv1d(1, 4, 3, padding=1), nn.Linear(12, 5)

    def forward(self, ids):
        return self.linear(self.conv(ids[:, None] / 97))


def transformers_model(name, **sizes):
    import transformers

    kind = getattr(transformers, name)
    return kind(kind.config_class(**{**SIZES, **sizes}))


def small(tied=False):
    return llama(hidden=16, tied=tied)


def of(build, **config):
    return build, config


def mixtral():
    return transformers_model("MixtralForCausalLM", intermediate_size=32, num_key_value_heads=2, num_local_experts=3)


def gpt2():
    return transformers_model("GPT2LMHeadModel")


def classifier():
    return transformers_model("LlamaForSequenceClassification", intermediate_size=32, num_labels=3)


def tagger():
    return transformers_model("BertForTokenClassification", intermediate_size=32)


def tied():
    return small(tied=True)


FEATURES = {  # name → how the model is built, the config's fields
    "list": of(small, **ATTENTION),
    "all-linear": of(small, target_modules="All-Linear"),
    "regex": of(small, target_modules=r".*\.1\..*q_proj"),
    "layers": of(small, **ATTENTION, layers_to_transform=[1]),
    "layers-int": of(small, **ATTENTION, layers_to_transform=1),
    "layers-pattern": of(small, **ATTENTION, layers_to_transform=[0], layers_pattern="layers"),
    "exclude": of(small, **ATTENTION, exclude_modules=["layers.0.self_attn.q_proj"]),
    "patterns": of(
        small, **ATTENTION, rank_pattern={"1.self_attn.q_proj": 2, "q_proj": 3}, alpha_pattern={"v_proj": -5}
    ),
    "negative": of(small, **ATTENTION, lora_alpha=-4),
    "zero": of(small, **ATTENTION, lora_alpha=0),
    "rslora": of(small, **ATTENTION, use_rslora=True),
    "rank-300": of(small, **ATTENTION, r=300),
    "dora": of(small, **ATTENTION, use_dora=True),
    "lora-bias": of(small, **ATTENTION, lora_bias=True),
    "bias-all": of(Mixed, target_modules=["linear"], bias="all"),
    "bias-lora-only": of(Mixed, target_modules=["linear"], bias="lora_only"),
    "conv": of(Mixed, target_modules=["conv", "linear"]),
    "conv1d": of(gpt2, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True),
    "lm-head": of(small, target_modules=["q_proj", "lm_head"]),
    "lm-head-tied": of(tied, target_modules=["q_proj", "lm_head"]),
    "embedding": of(small, target_modules=["q_proj", "embed_tokens"]),
    "embedding-only": of(small, target_modules=["embed_tokens"]),
    "modules": of(small, **ATTENTION, modules_to_save=["lm_head", "norm"]),
    "modules-tied": of(tied, **ATTENTION, modules_to_save=["embed_tokens"]),
    "classifier": of(classifier, **ATTENTION, task_type="SEQ_CLS"),
    "classifier-all-linear": of(classifier, target_modules="all-linear", task_type="SEQ_CLS"),
    "tagger": of(tagger, target_modules=["query"], task_type="TOKEN_CLS"),
    "tokens": of(small, **ATTENTION, trainable_token_indices=[3, 5]),
    "tokens-tied": of(tied, **ATTENTION, trainable_token_indices={"embed_tokens": [3, 5]}),
    "replication": of(small, **ATTENTION, layer_replication=[[0, 2], [1, 2]]),
    "experts": of(mixtral, target_modules=["q_proj"], target_parameters=["experts.gate_up_proj", "experts.down_proj"]),
    "experts-pattern": of(
        mixtral, target_modules=[], target_parameters=["experts.down_proj"], rank_pattern={"experts.down_proj": 2}
    ),
    "pissa": of(small, **ATTENTION, init_lora_weights="pissa"),
    "gaussian": of(small, **ATTENTION, init_lora_weights="Gaussian"),
    "orthogonal": of(small, **ATTENTION, init_lora_weights="orthogonal"),
    "qalora": of(small, **ATTENTION, use_qalora=True, qalora_group_size=8),
    "alora": of(small, **ATTENTION, alora_invocation_tokens=[3, 4], task_type="CAUSAL_LM"),
}
PEFT_ONLY = {  # what layers of this package do not have: a plain model refuses the file
    *(
        "rank-300",
        "lora-bias",
        "bias-all",
        "bias-lora-only",
        "conv",
        "embedding",
        "embedding-only",
        "modules-tied",
    ),
    *("tokens", "tokens-tied", "replication", "experts", "experts-pattern", "pissa", "qalora", "alora", "conv1d"),
}
UNSAVED = ["bias-lora-only"]  # older versions of PEFT save no biases for it


@functools.cache
def built(build):
    torch.manual_seed(0)
    return build().eval()


def base(name):
    """Returns the model without an adapter."""
    return copy.deepcopy(built(FEATURES[name][0]))


def peft_model(name):
    """Returns a PEFT model with this feature."""
    config = FEATURES[name][1]
    model = get_peft_model(base(name), LoraConfig(**{"r": 4, "lora_alpha": 8, **copy.deepcopy(config)}))
    return model.eval()


def trained(model):
    """Fills the trained parameters, fuses what can be fused, and returns the model."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn(parameter.shape, generator=generator) / 8
    lf.fuse_(model, allow_empty=True)
    return model


@torch.no_grad()
def outputs(model):
    result = model.eval()(batch())
    return getattr(result, "logits", result)
