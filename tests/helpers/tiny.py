"""A tiny random Llama, its batches, and snapshots that show any change of a model."""

import copy
import io
import pickle

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import lora_fast as lf

VOCABULARY = 97


class ShardedTensor(torch.Tensor):
    """A subclass of torch.Tensor that stands for DTensor."""


def llama(seed=0, dtype=torch.float32, tied=False, hidden=64, layers=2):
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        use_cache=False,
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    for name, module in list(model.named_modules()):
        if type(module).__name__ == "LlamaRMSNorm":  # always computes in float32, so it gives no oracle in float64
            model.set_submodule(name, nn.RMSNorm(hidden, eps=config.rms_norm_eps))
    return model.to(dtype)


def peft_llama(seed=0, dtype=torch.float32, r=4, alpha=8, dropout=0.0, targets="all-linear", filled=True, **options):
    """Returns a PeftModel over ``llama``. ``filled`` sets random values of lora_B, so that the adapter is not 0."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets, **options)
    model = get_peft_model(llama(seed, dtype), config)
    if filled:
        fill(model)
    return model


def fill(model, seed=1):
    """Sets random values of lora_B and returns the model. The initial lora_B is 0, which would hide most errors."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            values = torch.randn(parameter.shape, generator=generator) / 8
            parameter.data.copy_(values)
    return model


def injected_llama(seed=0, dtype=torch.float32, tied=False, hidden=64, **config):
    model = llama(seed, dtype, tied, hidden)
    lf.inject_(model, lf.LoRAConfig(**{"r": 4, "alpha": 8, **config}))
    return fill(model)


def batch(seed=0, rows=2, length=12):
    return torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def loss_of(model, ids):
    """Returns the next-token cross-entropy in the model's dtype (transformers' own loss computes in float32)."""
    logits = model(input_ids=ids).logits[:, :-1]
    return nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def snapshot(model):
    """Returns everything that a failed call must not change: identities of modules and parameters, flags and bits."""
    return {
        "modules": [(name, id(module), type(module)) for name, module in model.named_modules()],
        "parameters": [(name, id(p), p.requires_grad, p.dtype) for name, p in model.named_parameters()],
        "bits": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "buffers": [name for name, _ in model.named_buffers()],
    }


def assert_unchanged(model, before):
    after = snapshot(model)
    for part in ("modules", "parameters", "buffers"):
        assert after[part] == before[part], part
    assert_same_tensors(after["bits"], before["bits"])


def assert_same_tensors(these, those):
    assert these.keys() == those.keys()
    for name, tensor in these.items():
        assert torch.equal(tensor, those[name]), name


def through_torch_save(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


COPIES = {  # ways to copy a whole model
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": through_torch_save,
}


class Rows(torch.utils.data.Dataset):
    """Texts for a Trainer."""

    def __len__(self):
        return 20

    def __getitem__(self, i):
        ids = batch(i, rows=1)[0]
        return {"input_ids": ids, "labels": ids}
