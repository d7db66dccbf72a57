"""Embeddings that PEFT trains after new tokens were added: ``save_adapter`` writes PEFT's file, and ``load_adapter``
gives the model that PEFT's own round trip gives."""

import copy
import functools

import peft
import pytest
import safetensors.torch
import torch
import transformers
from torch import nn

import lora_fast as lf

pytestmark = [
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`"),
    pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings"),
]
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 97}
IDS = torch.tensor([[1, 2, 97, 99, 5, 98]])  # with new tokens
CASES = {
    "input": {"modules_to_save": ["embed_tokens"]},
    "output": {"modules_to_save": ["lm_head"]},
    "both": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "input-beside-adapter": {"modules_to_save": ["embed_tokens"], "target_modules": ["q_proj", "lm_head"]},
    "tokens": {"trainable_token_indices": [97, 99]},
}
TIED = pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])


@functools.cache
def _resized(folder, tied):
    config = transformers.LlamaConfig(**SIZES, num_key_value_heads=2, pad_token_id=0, tie_word_embeddings=tied)
    transformers.LlamaForCausalLM(config).save_pretrained(folder / str(tied))
    model = transformers.LlamaForCausalLM.from_pretrained(folder / str(tied))
    model.resize_token_embeddings(100, mean_resizing=False)
    model.lm_head.out_features = 100  # transformers 5.0 leaves the old number where the embeddings are tied
    return model


@pytest.fixture(scope="module")
def resized(tmp_path_factory):
    """Returns a function that builds a resized model, whose new rows differ from seed to seed."""
    folder = tmp_path_factory.mktemp("base")

    def build(tied, seed):
        model = copy.deepcopy(_resized(folder, tied))
        for embedding in (model.get_input_embeddings(), model.get_output_embeddings()):
            embedding.weight.data[97:] = torch.randn(3, 16, generator=torch.Generator().manual_seed(seed))
        return model

    return build


def adapted(model, **config):
    return peft.get_peft_model(model, peft.LoraConfig(**{"r": 2, "target_modules": ["q_proj"], **config}))


def randomized(model):
    torch.manual_seed(7)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.2)
    return model


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS).logits


def file(folder):
    return safetensors.torch.load_file(folder / "adapter_model.safetensors")


@TIED
@pytest.mark.parametrize("case", CASES)
def test_file_is_peft_s(case, tied, resized, tmp_path):
    model = randomized(adapted(resized(tied, 1), **CASES[case]))
    model.save_pretrained(tmp_path / "theirs")
    lf.fuse_(model)
    lf.save_adapter(model, tmp_path / "ours")
    if case != "tokens":  # whose merges are PEFT's, which keeps no original
        model.merge_adapter()
        lf.save_adapter(model, tmp_path / "merged")
    theirs = file(tmp_path / "theirs")
    assert any("embed_tokens" in key or "lm_head" in key for key in theirs)
    for folder in sorted(tmp_path.iterdir()):
        ours = file(folder)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in theirs)


@TIED
@pytest.mark.parametrize("saved", [True, False, "auto"])
@pytest.mark.parametrize("case", CASES)
def test_loading_gives_what_peft_s_round_trip_gives(case, saved, tied, resized, tmp_path):
    randomized(adapted(resized(tied, 1), **CASES[case])).save_pretrained(tmp_path, save_embedding_layers=saved)
    theirs = peft.PeftModel.from_pretrained(resized(tied, 2), tmp_path)
    want = logits(theirs)
    ours = adapted(resized(tied, 2), **CASES[case])
    lf.load_adapter(ours, tmp_path)
    assert torch.equal(logits(ours), want)
    with ours.disable_adapter(), theirs.disable_adapter():
        assert torch.equal(logits(ours), logits(theirs))
    plain, injected = resized(tied, 2), resized(tied, 2)
    lf.inject_(injected, lf.LoRAConfig(r=2, alpha=8, target_modules=CASES[case].get("target_modules", ["q_proj"])))
    refused = "trainable_token_indices" if case == "tokens" else "a parameter of its own in the model" if tied else ""
    for model in (plain, injected):
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        if refused:  # one place for what PEFT keeps apart
            with pytest.raises(lf.CheckpointError, match=refused):
                lf.load_adapter(model, tmp_path)
            assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        else:
            lf.load_adapter(model, tmp_path)
            torch.testing.assert_close(logits(model), want)
            lf.save_adapter(model, tmp_path / "again")
            again = peft.PeftModel.from_pretrained(resized(tied, 2), tmp_path / "again")
            torch.testing.assert_close(logits(again), want)


def test_adapter_beside_another_that_trains_the_embedding(resized, tmp_path):
    """PEFT has the embedding in a wrapper then, and calls it original_module in the file of the adapter that does not
    train it."""

    def build(seed):
        base = resized(False, seed)
        model = adapted(base, modules_to_save=["embed_tokens"])
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], base_model_name_or_path=base.name_or_path)
        model.add_adapter("plain", config)
        model.set_adapter("plain")
        return model

    model = randomized(build(1))
    lf.save_adapter(model, tmp_path)
    assert any("embed_tokens.original_module" in key for key in file(tmp_path))
    for twin in (build(2), adapted(resized(False, 2)), resized(False, 2)):
        lf.load_adapter(twin, tmp_path)
        torch.testing.assert_close(logits(twin), logits(model))
