"""Generation, pipelines and the switching of adapters in models of transformers."""

import pytest

pytest.importorskip("transformers", reason="pip install '.[works-with]'")
import peft
import tiny_model
import torch
import transformers
from paired_runs import adapted, assert_same, language_model, lora_config
from workflows import workflow

import lora_fast as lf

LIBRARY = "transformers"
TOKENS = tiny_model.byte_tokenizer()
TEXTS = ["7 green bottles", "take 3"]


def base(layers=2):
    return language_model(len(TOKENS), num_hidden_layers=layers).eval()


def model_of(change, **options):
    return change(adapted(base(), **options)).eval()


def prompts(texts=TEXTS):
    """Returns prompts of different lengths, with padding on the left."""
    TOKENS.padding_side = "left"
    return TOKENS(texts, return_tensors="pt", padding=True, return_token_type_ids=False)


def generate(model, texts=TEXTS, **options):
    """Returns the tokens and the scores of each step."""
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    result = model.generate(**prompts(texts), return_dict_in_generate=True, output_scores=True, **settings | options)
    return result.sequences, result.scores


@workflow("`generate`, greedy, two prompts with padding on the left", "tokens; scores: 1e-12")
def test_greedy():
    assert_same(lambda change: generate(model_of(change)))


@workflow("`generate(do_sample=True, top_p=…, temperature=…)`", "tokens after the same seed; scores: 1e-12")
def test_sampling():
    def workflow(change):
        model = model_of(change)
        transformers.set_seed(3)
        return generate(model, do_sample=True, top_p=0.9, temperature=1.5, top_k=20)

    assert_same(workflow)


@workflow("`generate(num_beams=3, num_return_sequences=2)`", "tokens; scores: 1e-12")
def test_beam_search():
    assert_same(lambda change: generate(model_of(change), num_beams=3, num_return_sequences=2))


@workflow("`generate` with `repetition_penalty`, `no_repeat_ngram_size` and `bad_words_ids`", "tokens; scores: 1e-12")
def test_logits_processors():
    options = {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "bad_words_ids": [[5], [9, 7]]}
    assert_same(lambda change: generate(model_of(change), **options))


@workflow('`generate` without a cache, and with `cache_implementation="static"`', "tokens; scores: 1e-12")
@pytest.mark.parametrize("options", [{"use_cache": False}, {"cache_implementation": "static"}], ids=["none", "static"])
def test_caches(options):
    settings = options | {"disable_compile": True}
    assert_same(lambda change: generate(model_of(change), **settings))


@workflow("`generate(prompt_lookup_num_tokens=3)`, speculative decoding from the prompt", "tokens; scores: 1e-12")
def test_prompt_lookup():
    run = lambda change: generate(model_of(change), ["ababababab"], prompt_lookup_num_tokens=3, eos_token_id=256)
    assert_same(run)


@workflow("`generate(assistant_model=…)`, an adapted model assisted by a smaller one", "tokens; scores: 1e-12")
def test_assisted_generation():
    assert_same(lambda change: generate(model_of(change), TEXTS[:1], assistant_model=base(layers=1)))


@workflow("`generate(streamer=TextStreamer(…))`", "the streamed text")
def test_streaming():
    class Pieces(transformers.TextStreamer):
        pieces: tuple = ()

        def on_finalized_text(self, text, stream_end=False):
            self.pieces += (text,)

    def workflow(change):
        streamer = Pieces(TOKENS)
        inputs = TOKENS(TEXTS[0], return_tensors="pt", return_token_type_ids=False)
        model_of(change).generate(**inputs, streamer=streamer, max_new_tokens=8, do_sample=False, pad_token_id=0)
        return streamer.pieces

    assert_same(workflow)


@workflow("`generate` in bfloat16", "the first step's scores: 6e-2 (two units of bfloat16)")
def test_generation_in_bfloat16():
    def workflow(change):
        model = model_of(change).to(torch.bfloat16)
        return generate(model, max_new_tokens=1)[1]

    assert_same(workflow, 6e-2)


@workflow("`generate(prefill_chunk_size=4)`", "tokens; scores: 1e-12")
def test_chunked_prefill():
    assert_same(lambda change: generate(model_of(change), prefill_chunk_size=4))


@workflow("A forward pass with `inputs_embeds`, `output_hidden_states` and `output_attentions`", "all of them: 1e-12")
def test_inner_states():
    def workflow(change):
        model = model_of(change)
        model.set_attn_implementation("eager")
        embedded = model.get_input_embeddings()(prompts()["input_ids"]).detach()
        result = model(inputs_embeds=embedded, output_hidden_states=True, output_attentions=True)
        return result.logits, result.hidden_states, result.attentions

    assert_same(workflow)


@workflow("`generate` of the merged model: `merge_and_unload`", "tokens; scores: 1e-12")
def test_generation_of_the_merged_model():
    def workflow(change):
        model = model_of(change)
        before = generate(model)
        return before, generate(model.merge_and_unload())

    assert_same(workflow)


@workflow("`generate` under `disable_adapter`, and after `set_adapter` of a second adapter", "tokens; scores: 1e-12")
def test_switching_adapters():
    def workflow(change):
        model = adapted(base())
        torch.manual_seed(5)
        model.add_adapter("other", lora_config(r=2))
        change(model).eval()
        results = [generate(model)]
        with model.disable_adapter():
            results.append(generate(model))
        model.set_adapter("other")
        return results + [generate(model)]

    assert_same(workflow)


@workflow("`generate(adapter_names=[…])`, another adapter for each row", "tokens; scores: 1e-12")
def test_adapters_by_row():
    def workflow(change):
        model = adapted(base())
        torch.manual_seed(5)
        model.add_adapter("other", lora_config(r=2))
        change(model).eval()
        return generate(model), generate(model, adapter_names=["default", "other"])

    assert_same(workflow)


@workflow('`pipeline("text-generation")`', "the texts")
def test_text_generation_pipeline():
    def workflow(change):
        writer = transformers.pipeline("text-generation", model=model_of(change), tokenizer=TOKENS, device="cpu")
        return writer(TEXTS, max_new_tokens=8, do_sample=False)

    assert_same(workflow)


@workflow("`pipeline(…)` for text classification, token classification and masks", "labels and texts; scores: 1e-12")
@pytest.mark.parametrize(
    ("task", "kind"),
    [
        ("text-classification", transformers.BertForSequenceClassification),
        ("token-classification", transformers.BertForTokenClassification),
        ("fill-mask", transformers.BertForMaskedLM),
    ],
    ids=["text", "token", "mask"],
)
def test_pipelines(task, kind):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    config = transformers.BertConfig(vocab_size=len(TOKENS) + 1, num_labels=3, **sizes)

    def workflow(change):
        tokens = tiny_model.byte_tokenizer()
        tokens.add_special_tokens({"mask_token": "<mask>"})
        torch.manual_seed(0)
        model = change(adapted(kind(config).double(), ["query", "value", "dense"])).eval()
        return transformers.pipeline(task, model=model, tokenizer=tokens, device="cpu")("7 <mask> bottles")

    assert_same(workflow)


@workflow('`pipeline("feature-extraction")`', "the features: 1e-12")
def test_feature_extraction_pipeline():
    def workflow(change):
        reader = transformers.pipeline("feature-extraction", model=model_of(change), tokenizer=TOKENS, device="cpu")
        return reader(TEXTS)

    assert_same(workflow)


@workflow("`from_pretrained` of a folder with `adapter_config.json`, then `lf.fuse_`", "logits: 1e-12")
def test_model_loaded_with_its_adapter(tmp_path):
    model = adapted(base())
    base().save_pretrained(tmp_path / "base")
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")

    def workflow(change):
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
        return change(loaded).eval()(**prompts()).logits

    assert_same(workflow)


@workflow("`AutoPeftModelForCausalLM.from_pretrained(…)` of a folder from `lf.save_adapter`", "logits: 1e-12")
def test_adapter_saved_by_us(tmp_path):
    base().save_pretrained(tmp_path / "base")

    def workflow(change):
        model = model_of(change)
        model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
        lf.save_adapter(model, tmp_path / "adapter")
        loaded = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", is_trainable=True)
        return model(**prompts()).logits, loaded.eval()(**prompts()).logits

    assert_same(workflow)


@workflow(
    '`generate(cache_implementation="static")`, compiled (backend `aot_eager`)',
    "tokens; scores: 1e-12",
)
@pytest.mark.budget
def test_compiled_generation():
    def workflow(change):
        torch.compiler.reset()
        torch._dynamo.utils.counters.clear()
        model = model_of(change)
        compiling = transformers.CompileConfig(backend="aot_eager", fullgraph=True)
        compiling._compile_all_devices = True  # transformers compiles nothing on a CPU otherwise
        result = generate(model, cache_implementation="static", compile_config=compiling)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
        return result

    assert_same(workflow, calls_are_seen=False)
