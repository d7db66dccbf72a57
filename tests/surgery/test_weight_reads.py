"""Layers whose weight a model reads without calling the layer are left alone, and no others."""

import functools
import linecache
import re
import types
import warnings

import peft
import pytest
import torch
import transformers
from tiny import llama, peft_llama
from torch import nn
from torch.nn.functional import cross_entropy, linear
from torch.utils.checkpoint import checkpoint

import lora_fast as lf
from lora_fast.surgery.weight_reads import weight_reads

SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1}


def mamba():
    return transformers.MambaForCausalLM(transformers.MambaConfig(**SMALL, state_size=4))


def bloom(**options):
    return transformers.BloomModel(
        transformers.BloomConfig(vocab_size=64, hidden_size=32, n_layer=1, n_head=4, **options)
    )


def wavlm():
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    convolutions = {"conv_dim": (16,), "conv_stride": (4,), "conv_kernel": (4,), "num_feat_extract_layers": 1}
    config = transformers.WavLMConfig(
        **sizes, **convolutions, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2
    )
    return transformers.WavLMModel(config)


def t5():
    return transformers.T5EncoderModel(
        transformers.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4)
    )


def rwkv():
    return transformers.RwkvModel(
        transformers.RwkvConfig(**{**SMALL, "num_hidden_layers": 2}, attention_hidden_size=32)
    )


MODELS = {  # model → the last parts of the names of linear layers whose weight is read
    "mamba": (mamba, {"x_proj", "dt_proj", "out_proj"}),
    "wavlm": (wavlm, {"q_proj", "k_proj", "v_proj", "out_proj"}),
    "bloom-slow": (lambda: bloom(pretraining_tp=2, slow_but_exact=True), {"dense", "dense_4h_to_h"}),
    "bloom": (bloom, set()),  # the same reads, under a condition that is false
    "t5": (t5, set()),  # reads the dtype of a weight
    "rwkv": (rwkv, set()),  # divides weights in place
    "encoder-layer": (lambda: nn.TransformerEncoderLayer(16, 2, 32), {"linear1", "linear2", "out_proj"}),
    "decoder-layer": (lambda: nn.TransformerDecoderLayer(16, 2, 32), {"out_proj"}),
    "llama": (llama, set()),
}


@pytest.mark.parametrize("case", MODELS)
def test_weight_reads_of_models(case):
    build, expected = MODELS[case]
    model = build()
    names = {module: name for name, module in model.named_modules()}
    read = {names[layer].rpartition(".")[2] for layer in weight_reads(model) if isinstance(layer, nn.Linear)}
    assert read == expected


class Block(nn.Module):
    """Reads weights in each way that a model's own code may use, and calls ``plain`` only."""

    def __init__(self):
        super().__init__()
        names = ("plain", "direct", "named", "passed", "fetched", "nested", "metadata", "initialised")
        for name in names:
            setattr(self, name, nn.Sequential(nn.Linear(4, 4)) if name == "nested" else nn.Linear(4, 4))
        self.listed = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self._init_weights()

    def _init_weights(self):
        self.initialised.weight.data.mul(2.0)

    def forward(self, x):
        layer = self.named
        x = self.plain(x).to(self.metadata.weight.dtype)
        x = linear(linear(x, self.direct.weight), layer.weight)
        x = linear(linear(times(self.passed, x), getattr(self.fetched, "weight")), self.nested[0].weight)  # noqa: B009
        for other in self.listed:
            x = x @ other.weight
        return x


def times(layer, x):
    return linear(x, layer.weight)


SPELLINGS = {  # the body of a forward → the layers whose weight it reads
    "return x @ torch.stack([layer.weight for layer in self.list]).sum(0)": "list.0 list.1",
    "for i, (layer, norm) in enumerate(zip(self.list, [self.norm] * 2)): x = norm(x @ layer.weight)": "list.0 list.1",
    "for _, layer in self.dict.items(): x = x @ layer.weight": "dict.c dict.d",
    "for name in self.dict: x = x @ self.dict[name].weight": "dict.c dict.d",
    "return x @ sum(layer.weight for layer in list(self.dict.values())[1:])": "dict.c dict.d",
    "for layer in self.list[1:]: x = x @ layer.weight": "list.0 list.1",
    "for name in ('a', 'b'): x = x @ getattr(self, name).weight": "a b",
    "a, (b, _) = self.a, (self.b, self.norm); return x @ a.weight @ b.weight": "a b",
    "project = lambda x, layer: x @ layer.weight; return checkpoint(project, x, self.a)": "a",
    "return x @ self.get_a().weight": "a",
    "return x @ self.matrix": "a",
    "return x @ self.first.weight": "list.0",
    "return self.list[0](x @ self.list[-1].weight)": "list.1",
    "return x @ self.get_submodule('dict.c').weight": "dict.c",
    "return self.helper(self.a, x)": "a",
    "return self.static(x, self.a)": "a",
    "return Helpers.static(x, self.a)": "a",
    "return times(x=x, layer=self.a)": "a",
    "return functools.partial(times, self.a)(x)": "a",
    "return checkpoint(times, self.a, x, use_reentrant=False)": "a",
    "return x @ (layer := self.a).weight + layer.bias": "a",
    "return x @ (self.a if x.sum() > 0 else self.b).weight": "a b",
    "return x @ self.a._parameters['weight']": "a",
    "return x @ self.a._parameters.get('weight')": "a",
    "return linear(x, *self.a.parameters())": "a",
    "return linear(x, **dict(self.a.named_parameters()))": "a",
    "return linear(x, **self.a.state_dict())": "a",
    # None of these reads a weight without calling the layer.
    "return self.get_a()(x.to(getattr(self.a, 'weight').dtype))": "",
    "return self.a.forward(x.to(next(self.a.parameters()).dtype))": "",
    "return sum(layer(x) for layer in self.list) + self.a._parameters['bias']": "",
    "if hasattr(self.a.weight, 'quant_state'): return times(self.a, x)": "",
}


class Helpers(nn.Module):
    """Two layers, two in a list and two in a dictionary, and methods that return them or read their weight."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.norm = nn.Linear(4, 4), nn.Linear(4, 4), nn.LayerNorm(4)
        self.list = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.dict = nn.ModuleDict({"c": nn.Linear(4, 4), "d": nn.Linear(4, 4)})

    def get_a(self):
        if not hasattr(self, "a"):
            return None
        return self.a

    def helper(self, layer, x):
        return self.deeper(x, layer=layer)

    def deeper(self, x, *, layer):
        return x @ layer.weight

    @staticmethod
    def static(x, layer):
        return x @ layer.weight

    @property
    def first(self):
        return self.list[0]

    @property
    def matrix(self):
        return self.a.weight


@pytest.mark.parametrize("body", SPELLINGS)
def test_weight_reads_in_each_spelling(body, monkeypatch):
    source = f"def forward(self, x):\n    {body}\n"
    monkeypatch.setitem(linecache.cache, "<body>", (len(source), None, source.splitlines(True), "<body>"))
    names = {"functools": functools, "torch": torch, "linear": linear, "checkpoint": checkpoint, "times": times}
    names["Helpers"] = Helpers
    exec(compile(source, "<body>", "exec"), names)
    model = type("Model", (Helpers,), {"forward": names["forward"]})()
    reads = weight_reads(model)
    assert (
        " ".join(name for name, module in model.named_modules() if module in reads and name != "norm")
        == SPELLINGS[body]
    )


def test_inject_leaves_layers_whose_weight_is_read():
    report = lf.inject_(nn.Sequential(Block()), lf.LoRAConfig(r=2))
    assert set(report.changed) == {"0.plain", "0.metadata", "0.initialised"}
    assert set(report.left.values()) == {"Block.forward reads its weight without calling it"}


def fused_loss_forward(self, input_ids, labels):
    """A forward as Liger and cut-cross-entropy install it: the logits are never formed by a call of the head."""
    hidden = self.model(input_ids)[0]
    return cross_entropy(linear(hidden, self.lm_head.weight).flatten(0, 1), labels.flatten())


@pytest.mark.parametrize("where", ["instance", "class"])
def test_head_under_a_fused_loss_is_left(where, monkeypatch):
    model, config = llama(), lf.LoRAConfig(r=2, target_modules=["q_proj", "lm_head"])
    if where == "instance":
        model.forward = types.MethodType(fused_loss_forward, model)
    else:
        monkeypatch.setattr(type(model), "forward", fused_loss_forward)
    report = lf.inject_(model, config)
    assert "fused_loss_forward reads its weight" in report.left["lm_head"] and len(report.changed) == 2
    monkeypatch.undo()
    assert "lm_head" in lf.inject_(llama(), config).changed


def test_optimizer_warns_of_an_adapter_that_a_later_patch_reads():
    model = llama()
    lf.inject_(model, lf.LoRAConfig(r=2, target_modules=["q_proj", "lm_head"]))
    with warnings.catch_warnings(action="error"):
        lf.optim.LoRAAdamW(model)
    model.forward = types.MethodType(fused_loss_forward, model)
    with pytest.warns(
        UserWarning, match="the adapter of lm_head may have no effect: .*fused_loss_forward reads"
    ) as told:
        lf.optim.LoRAAdamW(model)
    assert len(told) == 1


def test_fuse_leaves_layers_whose_weight_is_read():
    model = peft.get_peft_model(mamba(), peft.LoraConfig(r=2, target_modules=["in_proj", "x_proj"]))
    report = lf.fuse_(model)
    assert [name.rpartition(".")[2] for name in report.changed] == ["in_proj"]
    assert re.match(r"MambaMixer\.\w+ reads its weight", next(iter(report.left.values())))
    assert len(lf.fuse_(peft_llama()).changed) == 14


def test_load_adapter_refuses_a_layer_whose_weight_is_read(tmp_path):
    trained = nn.Sequential(nn.ModuleDict({"direct": nn.Linear(4, 4)}))
    lf.inject_(trained, lf.LoRAConfig(r=2))
    lf.save_adapter(trained, tmp_path)
    with pytest.raises(lf.CheckpointError, match=r"keys of 0.direct: .*Block.forward reads its weight"):
        lf.load_adapter(nn.Sequential(Block()), tmp_path)


class Attention(nn.Module):
    """As diffusers' attention: the user, not forward, calls the method that reads."""

    def __init__(self):
        super().__init__()
        self.to_q, self.to_k = nn.Linear(4, 4), nn.Linear(4, 4)

    def fuse_projections(self):
        return torch.cat([self.to_q.weight, self.to_k.weight])

    def forward(self, x):
        return self.to_q(x) * self.to_k(x)


def test_methods_that_users_call_to_fuse_projections_do_not_count():
    assert not weight_reads(nn.Sequential(Attention()))


def test_a_condition_that_is_unknown_counts_as_true():
    class Sometimes(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.fast = nn.Linear(4, 4), False

        def forward(self, x):
            if self.training and x.is_cuda:
                return linear(x, self.layer.weight)
            if self.fast:
                return x @ self.layer.weight
            return self.layer(x)

    model = nn.Sequential(Sometimes())
    assert list(weight_reads(model)) == [model[0].layer]
    assert model(torch.ones(1, 4)).shape == (1, 4)
