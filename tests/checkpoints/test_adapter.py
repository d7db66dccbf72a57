"""save_adapter and load_adapter: PEFT reads ours, we read PEFT's, bit for bit; bad files change nothing."""

import copy
import json
import os
import struct
from pathlib import Path

import pytest
import safetensors.torch
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from tiny import assert_same_tensors, assert_unchanged, batch, fill, injected_llama, llama, peft_llama, snapshot
from torch import nn

import lora_fast as lf

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
LAYER = "model.layers.0.self_attn.q_proj"
KEY = f"{PREFIX}{LAYER}.lora_A.weight"
BASE = f"{PREFIX}{LAYER}.base_layer.weight"
LLAMA_LINEARS = 14  # in two layers


def adapters_of(model):
    """Returns key in the file → tensor, for any kind of model."""
    tensors = {}
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            name = PREFIX + name.removeprefix(PREFIX).replace(".default", "")
            tensors[name if name.endswith(".weight") else f"{name}.weight"] = parameter.detach()
    return tensors


SHAPES = {
    "all-linear": {},
    "some-targets": {"target_modules": ["q_proj", "down_proj"]},
    "lm-head": {"target_modules": ["lm_head", "v_proj"]},
    "rslora": {"use_rslora": True, "r": 6},
    "odd-alpha-and-dropout": {"alpha": 5.5, "dropout": 0.25},
}


@pytest.mark.parametrize("case", SHAPES)
def test_peft_loads_a_saved_adapter(case, tmp_path):
    model = injected_llama(**SHAPES[case]).eval()
    report = lf.save_adapter(model, tmp_path)
    assert set(report.changed) == {name for name, m in model.named_modules() if isinstance(m, lf.LoRALinear)}
    theirs = PeftModel.from_pretrained(llama(), tmp_path).eval()
    assert_same_tensors(adapters_of(theirs), adapters_of(model))
    lf.fuse_(theirs)
    assert torch.equal(theirs(batch()).logits, model(batch()).logits)
    assert theirs.peft_config["default"].lora_dropout == SHAPES[case].get("dropout", 0.0)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "peft"])
@pytest.mark.parametrize("case", SHAPES)
def test_load_adapter_reads_peft_s_folder(case, fused, tmp_path):
    options = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
    for name, value in SHAPES[case].items():
        options[{"alpha": "lora_alpha", "dropout": "lora_dropout"}.get(name, name)] = value
    theirs = fill(get_peft_model(llama(), LoraConfig(**options))).eval()
    lf.fuse_(theirs)
    logits = theirs(batch()).logits
    if not fused:
        lf.unfuse_(theirs)
    theirs.save_pretrained(tmp_path)
    model = llama()
    report = lf.load_adapter(model, tmp_path)
    model.eval()
    assert len(report.changed) == len(adapters_of(theirs)) // 2
    assert_same_tensors(adapters_of(model), adapters_of(theirs))
    assert torch.equal(model(batch()).logits, logits)
    assert all(parameter.requires_grad == ("lora_" in name) for name, parameter in model.named_parameters())


def test_load_adapter_keeps_the_parameters_of_injected_layers(tmp_path):
    lf.save_adapter(injected_llama(), tmp_path)
    model = injected_llama(seed=7)
    fill(model, seed=8)
    parameters = dict(model.named_parameters())
    report = lf.load_adapter(model, tmp_path)
    assert report.changed[LAYER] == "lora_A (4, 64), lora_B (64, 4)"
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert_same_tensors(adapters_of(model), safetensors.torch.load_file(tmp_path / WEIGHTS))


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "peft"])
def test_load_and_save_of_a_peft_model_keep_every_bit(fused, tmp_path):
    lf.save_adapter(injected_llama(), tmp_path / "ours")
    model = peft_llama(seed=7)
    if fused:
        lf.fuse_(model)
    lf.load_adapter(model, tmp_path / "ours")
    report = lf.save_adapter(model, tmp_path / "theirs")
    assert len(report.changed) == LLAMA_LINEARS and LAYER in report.changed
    files = [safetensors.torch.load_file(tmp_path / which / WEIGHTS) for which in ("ours", "theirs")]
    assert_same_tensors(*files)
    assert_same_tensors(adapters_of(PeftModel.from_pretrained(llama(), tmp_path / "theirs")), files[0])


def test_active_one_of_several_adapters_is_saved_and_loaded(tmp_path):
    model = peft_llama(targets=["q_proj"])
    model.add_adapter("second", LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj"]))
    model.set_adapter("second")
    fill(model, seed=4)
    lf.save_adapter(model, tmp_path)
    assert sorted(os.listdir(tmp_path)) == [CONFIG, WEIGHTS]
    saved = safetensors.torch.load_file(tmp_path / WEIGHTS)
    assert saved[KEY].shape == (3, 64)
    before = model.base_model.model.model.layers[0].self_attn.q_proj.lora_A["default"].weight.clone()
    fill(model, seed=5)
    lf.load_adapter(model, tmp_path)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert torch.equal(layer.lora_B["second"].weight, saved[KEY.replace("lora_A", "lora_B")])
    assert torch.equal(layer.lora_A["default"].weight, before)


def test_ranks_and_scales_may_differ_between_layers(tmp_path):
    model = llama()
    lf.inject_(model, lf.LoRAConfig(r=4, alpha=8, target_modules=["q_proj"]))
    lf.inject_(model, lf.LoRAConfig(r=7, alpha=3, target_modules=["v_proj", "layers.1.mlp.up_proj"]))
    lf.inject_(model, lf.LoRAConfig(r=4, alpha=5, use_rslora=True, target_modules=["o_proj"]))
    model.model.layers[0].self_attn.q_proj.scaling = 0.3
    fill(model).eval()
    lf.save_adapter(model, tmp_path)
    theirs, ours = PeftModel.from_pretrained(llama(), tmp_path), llama()
    lf.load_adapter(ours, tmp_path)
    for name, layer in model.named_modules():
        if isinstance(layer, lf.LoRALinear):
            scales = ours.get_submodule(name).scaling, theirs.get_submodule(PREFIX + name).scaling["default"]
            assert scales == pytest.approx((layer.scaling, layer.scaling), rel=1e-15), name
    for twin in (ours, theirs):
        assert_same_tensors(adapters_of(twin), adapters_of(model))


def test_load_adapter_reads_patterns_and_exclusions(tmp_path):
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "v_proj"],
        exclude_modules=["layers.1.self_attn.v_proj"],
        rank_pattern={"v_proj": 6},
        alpha_pattern={r"layers\.1.*": 2},
    )
    theirs = fill(get_peft_model(llama(), config))
    theirs.save_pretrained(tmp_path)
    model = llama()
    assert len(lf.load_adapter(model, tmp_path).changed) == 3
    assert_same_tensors(adapters_of(model), adapters_of(theirs))
    for name, layer in model.named_modules():
        if isinstance(layer, lf.LoRALinear):
            assert layer.scaling == theirs.get_submodule(PREFIX + name).scaling["default"]


def test_name_that_ends_another_is_not_taken_for_it(tmp_path):
    def build():
        torch.manual_seed(0)
        return nn.ModuleDict({"proj": nn.Linear(8, 8), "block": nn.ModuleDict({"proj": nn.Linear(8, 8)})})

    model = build()
    lf.inject_(model, lf.LoRAConfig(r=2, target_modules=r"proj"))
    lf.save_adapter(model, tmp_path)
    theirs, ours = PeftModel.from_pretrained(build(), tmp_path), build()
    lf.load_adapter(ours, tmp_path)
    for twin in (theirs, ours):
        assert_same_tensors(adapters_of(twin), adapters_of(model))


def compile_block(model):
    layers = next(module for module in model.modules() if isinstance(module, nn.ModuleList))
    layers[0] = torch.compile(layers[0], backend="eager")
    return model


@pytest.mark.parametrize("build", [injected_llama, peft_llama], ids=["injected", "peft"])
@pytest.mark.parametrize(
    "wrap",
    [lambda model: torch.compile(model, backend="eager"), nn.DataParallel, compile_block],
    ids=["compiled", "data-parallel", "compiled-block"],
)
def test_wrapped_model_is_saved_under_the_plain_names(wrap, build, tmp_path):
    wrapped, plain = wrap(build()), adapters_of(build())
    lf.save_adapter(wrapped, tmp_path)
    assert_same_tensors(safetensors.torch.load_file(tmp_path / WEIGHTS), plain)
    assert lf.load_adapter(wrapped, tmp_path).changed[LAYER] == "lora_A (4, 64), lora_B (64, 4)"


def test_16_bit_adapters_widen_exactly(tmp_path):
    model = injected_llama().bfloat16()
    lf.save_adapter(model, tmp_path)
    wide = llama(dtype=torch.bfloat16)
    lf.load_adapter(wide, tmp_path)
    assert {tensor.dtype for tensor in adapters_of(wide).values()} == {torch.float32}
    assert_same_tensors(adapters_of(wide), {key: tensor.float() for key, tensor in adapters_of(model).items()})


def test_saved_files_are_peft_s(tmp_path):
    lf.save_adapter(injected_llama(), tmp_path)
    assert sorted(os.listdir(tmp_path)) == [CONFIG, WEIGHTS]
    with safe_open(tmp_path / WEIGHTS, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    config = json.loads((tmp_path / CONFIG).read_text())
    ours = LoraConfig.from_pretrained(tmp_path)
    assert set(config) <= set(ours.to_dict())
    assert (ours.r, ours.lora_alpha, ours.bias, ours.task_type) == (4, 8, "none", "CAUSAL_LM")


# writing


def test_failed_save_leaves_the_old_adapter(tmp_path, monkeypatch):
    lf.save_adapter(injected_llama(), tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in (CONFIG, WEIGHTS)}

    def fail(*args):
        raise OSError(28, "No space left on device")

    for function in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, function, fail)
            with pytest.raises(lf.CheckpointError, match=r"path: expected .* No space left"):
                lf.save_adapter(injected_llama(seed=1, r=5), tmp_path)
        assert {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)} == before


def test_save_syncs_every_file_before_the_first_rename(tmp_path, monkeypatch):
    calls, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: (calls.append("fsync"), fsync(descriptor))[1])
    monkeypatch.setattr(os, "replace", lambda *paths: (calls.append("replace"), replace(*paths))[1])
    lf.save_adapter(injected_llama(), tmp_path)
    assert calls == ["fsync", "fsync", "replace", "replace", "fsync"]


def file_in_the_way(folder):
    folder.write_text("a file")


def folder_in_the_way(folder):
    (folder / WEIGHTS).mkdir(parents=True)


@pytest.mark.parametrize("spoil", [file_in_the_way, folder_in_the_way])
def test_save_refuses_a_path_that_cannot_be_written(spoil, tmp_path):
    spoil(tmp_path / "adapter")
    with pytest.raises(lf.CheckpointError, match="path: expected a folder that can be written"):
        lf.save_adapter(injected_llama(), tmp_path / "adapter")


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_save_refuses_a_read_only_folder(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(lf.CheckpointError, match="Permission denied"):
        lf.save_adapter(injected_llama(), tmp_path)


def two_active():
    model = peft_llama(targets=["q_proj"])
    model.add_adapter("second", LoraConfig(r=3, target_modules=["q_proj"]))
    model.base_model.set_adapter(["default", "second"])
    return model


def peft_over_ours():
    model = llama()
    lf.inject_(model, lf.LoRAConfig(r=2, target_modules=["k_proj"]))
    return get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"]))


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (llama, "LoRA layers"),
        (peft_over_ours, "alone, got both"),
        (lambda: injected_llama().to("meta"), "a parameter with data"),
        (lambda: lf.LoRALinear(8, 8, r=2, alpha=2), "a module that contains"),
        (two_active, "one active adapter"),
    ],
    ids=["plain", "both", "meta", "single-layer", "two-active"],
)
def test_save_refuses_models_without_one_whole_adapter(build, says, tmp_path):
    with pytest.raises(lf.CheckpointError, match=says):
        lf.save_adapter(build(), tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


# reading what is not right


def edit_tensors(change):
    def spoil(folder):
        tensors = safetensors.torch.load_file(folder / WEIGHTS)
        change(tensors)
        safetensors.torch.save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})

    return spoil


def edit_config(**values):
    def spoil(folder):
        config = json.loads((folder / CONFIG).read_text()) | values
        (folder / CONFIG).write_text(json.dumps(config))

    return spoil


def write_bytes(name, data):
    return lambda folder: (folder / name).write_bytes(data((folder / name).read_bytes()) if callable(data) else data)


def duplicate_key(folder):
    """Two entries of one name, as no library writes them: safetensors would take the last."""
    data = (folder / WEIGHTS).read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    entry = f'"{KEY}":{json.dumps(json.loads(data[8 : 8 + length])[KEY])},'
    header = (data[8:9].decode() + entry + data[9 : 8 + length].decode().rstrip()).encode()
    header += b" " * (-len(header) % 8)
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(header)) + header + data[8 + length :])
    safetensors.torch.load_file(folder / WEIGHTS)


def drop_layer(tensors):
    for factor in "AB":
        del tensors[KEY.replace("lora_A", f"lora_{factor}")]


def rename_layer(tensors):
    for factor in "AB":
        key = KEY.replace("lora_A", f"lora_{factor}")
        tensors[key.replace("q_proj", "r_proj")] = tensors.pop(key)


def copy_layer(tensors):
    for factor in "AB":
        key = KEY.replace("lora_A", f"lora_{factor}")
        tensors[key.replace("q_proj", "r_proj")] = tensors[key].clone()


def remove_folder(folder):
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()


def replace_folder_by_file(folder):
    remove_folder(folder)
    folder.write_text("not a folder")


BAD = {
    "no-folder": (remove_folder, ["path", "nothing there"]),
    "a-file": (replace_folder_by_file, ["path", "a file"]),
    "no-config": (lambda folder: (folder / CONFIG).unlink(), ["path", CONFIG]),
    "no-weights": (lambda folder: (folder / WEIGHTS).unlink(), ["path", WEIGHTS]),
    "config-not-json": (write_bytes(CONFIG, b"{r: 4"), [CONFIG, "a JSON object"]),
    "config-not-utf8": (write_bytes(CONFIG, b"\xff\xfe{"), [CONFIG, "a JSON object"]),
    "config-a-list": (write_bytes(CONFIG, b"[]"), [CONFIG, "list"]),
    "not-lora": (edit_config(peft_type="IA3"), ["peft_type", "LORA", "IA3"]),
    "dora": (edit_config(use_dora=True), ["use_dora"]),
    "lora-bias": (edit_config(lora_bias=True), ["lora_bias"]),
    "modules-to-save": (edit_config(modules_to_save=["lm_head"]), ["lm_head", "modules_to_save"]),
    "unknown-variant": (edit_config(new_config={"a": 1}), ["new_config"]),
    "pissa": (edit_config(init_lora_weights="pissa"), ["init_lora_weights", "pissa"]),
    "rank-0": (edit_config(r=0), [f"r in {CONFIG}", "0"]),
    "rank-257": (edit_config(r=257), ["lora_A.weight", "the rank, 257"]),
    "alpha-nan": (edit_config(lora_alpha=float("nan")), ["lora_alpha", "nan"]),
    "no-alpha": (edit_config(lora_alpha=None), ["lora_alpha", "None"]),
    "dropout-2": (edit_config(lora_dropout=2), ["lora_dropout", "2"]),
    "targets-a-number": (edit_config(target_modules=5), ["target_modules", "5"]),
    "bad-pattern": (edit_config(rank_pattern={"(": 3}), ["rank_pattern"]),
    "other-rank": (edit_config(r=5), ["lora_A.weight", "the rank, 5, in dimension 0", "(4, "]),
    "truncated": (write_bytes(WEIGHTS, lambda data: data[:-100]), [WEIGHTS, "safetensors"]),
    "truncated-header": (write_bytes(WEIGHTS, lambda data: data[:20]), [WEIGHTS, "safetensors"]),
    "empty": (write_bytes(WEIGHTS, b""), [WEIGHTS, "safetensors"]),
    "a-pickle": (lambda folder: torch.save({"a": 1}, folder / WEIGHTS), [WEIGHTS, "safetensors"]),
    "duplicate-key": (duplicate_key, [KEY, "duplicate"]),
    "missing-key": (edit_tensors(lambda tensors: tensors.pop(KEY)), [KEY, "missing"]),
    "missing-layer": (edit_tensors(drop_layer), [KEY, "missing"]),
    "no-keys": (edit_tensors(lambda tensors: tensors.clear()), [WEIGHTS, "at least one pair"]),
    "extra-key": (edit_tensors(lambda t: t.update(extra=torch.zeros(1))), ["key extra", "an extra key"]),
    "renamed-layer": (edit_tensors(rename_layer), [KEY, "missing"]),
    "extra-layer": (edit_tensors(copy_layer), ["r_proj", "an extra key", "no such layer"]),
    "other-base-weight": (edit_tensors(lambda t: t.update({BASE: torch.ones(64, 64)})), [BASE, "other values"]),
    "shape": (edit_tensors(lambda t: t.update({KEY: torch.zeros(4, 63)})), [KEY, "(4, 64)", "(4, 63)"]),
    "transposed": (edit_tensors(lambda t: t.update({KEY: t[KEY].t().contiguous()})), [KEY, "(64, 4)"]),
    "one-dimension": (edit_tensors(lambda t: t.update({KEY: torch.zeros(4)})), [KEY, "(4,)"]),
    "integers": (edit_tensors(lambda t: t.update({KEY: t[KEY].int()})), [KEY, "int32"]),
    "float64": (edit_tensors(lambda t: t.update({KEY: t[KEY].double()})), [KEY, "float64", "without loss"]),
}


@pytest.fixture(scope="module")
def models():
    return {"plain": llama(), "injected": injected_llama(), "peft": peft_llama()}


@pytest.mark.parametrize("kind", ["plain", "injected", "peft"])
@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_refused_and_change_nothing(case, kind, models, tmp_path):
    spoil, says = BAD[case]
    model, folder = models[kind], tmp_path / "adapter"
    lf.save_adapter(injected_llama(seed=9), folder)
    spoil(folder)
    before = snapshot(model)
    with pytest.raises(lf.CheckpointError) as raised:
        lf.load_adapter(model, folder)
    assert all(part in str(raised.value) for part in says), raised.value
    assert_unchanged(model, before)


def merged():
    model = injected_llama()
    lf.merge_(model)
    return model


def parametrized_llama():
    model = llama()
    model.model.layers[0].self_attn.q_proj = nn.utils.parametrizations.weight_norm(nn.Linear(64, 64))
    return model


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda: injected_llama(target_modules=["q_proj"]), ["an extra key", "the model has no such layer"]),
        (lambda: injected_llama(r=5), ["shape (5, 64)", "(4, 64)"]),
        (lambda: injected_llama(alpha=9), ["lora_alpha", "2.25", "got 2"]),
        (lambda: peft_llama(alpha=9), ["lora_alpha", "2.25", "got 2"]),
        (lambda: peft_llama(targets=["q_proj"]), ["an extra key"]),
        (lambda: peft_llama(use_dora=True), ["use_dora", "expected True"]),
        (lambda: injected_llama(use_dora=True), ["use_dora", "expected True"]),
        (lambda: injected_llama().bfloat16(), ["bfloat16", "float32"]),
        (merged, ["unmerged layers"]),
        (two_active, ["one active adapter"]),
        (lambda: llama(hidden=32), ["shape (4, 64)", "(4, 128)"]),
        (lambda: llama(layers=1), ["model.layers.1", "an extra key"]),
        (lambda: llama(layers=3), ["model.layers.2", "missing"]),
        (parametrized_llama, ["parametrized"]),
        (lambda: nn.Linear(8, 8), ["LoRALinear.from_linear"]),
    ],
    ids=[
        *("layers", "rank", "alpha", "peft-alpha", "peft-layers", "peft-dora", "dora", "dtype", "merged", "two-active"),
        *("width", "shallower", "deeper", "unfit", "a-linear"),
    ],
)
def test_model_that_does_not_fit_is_left_unchanged(build, says, tmp_path):
    lf.save_adapter(injected_llama(seed=9), tmp_path)
    edit_config(target_modules=r".*_proj")(tmp_path)  # as a user writes it: names layers that are not in the file too
    model = build()
    before = snapshot(model)
    with pytest.raises(lf.ArgumentError) as raised:
        lf.load_adapter(model, tmp_path)
    assert all(part in str(raised.value) for part in says), raised.value
    assert_unchanged(model, before)


def test_paths_may_be_strings_and_folders_are_made(tmp_path):
    path = str(tmp_path / "a" / "b")
    lf.save_adapter(injected_llama(), path)
    assert (Path(path) / WEIGHTS).is_file()
    lf.load_adapter(llama(), path)


def test_pattern_of_a_short_name_does_not_match_a_longer_one(tmp_path):
    """PEFT takes the first pattern that matches a name's end: "proj" would be the one for "z.proj" too."""

    def build():
        torch.manual_seed(0)
        return nn.ModuleDict({"proj": nn.Linear(8, 8), "z": nn.ModuleDict({"proj": nn.Linear(8, 8)})})

    model = build()
    lf.inject_(model, lf.LoRAConfig(r=2, target_modules="proj"))
    lf.inject_(model, lf.LoRAConfig(r=3, target_modules=["z.proj"]))
    lf.save_adapter(model, tmp_path)
    ranks = PeftModel.from_pretrained(build(), tmp_path).base_model.model
    assert (ranks["proj"].r["default"], ranks["z"]["proj"].r["default"]) == (2, 3)


class WithModule(nn.Module):
    """A model whose own child is called as data parallelism calls the model that it wraps."""

    def __init__(self):
        super().__init__()
        self.module = nn.ModuleDict({"q_proj": nn.Linear(8, 8)})

    def forward(self, x):
        return self.module["q_proj"](x)


def test_adapter_files_keep_the_name_of_a_child_called_module(tmp_path):
    torch.manual_seed(0)
    model = WithModule()
    base = copy.deepcopy(model)
    lf.inject_(model, lf.LoRAConfig(r=2))
    nn.init.normal_(model.module["q_proj"].lora_B)
    lf.save_adapter(model, tmp_path)
    x = torch.randn(3, 8)
    theirs = PeftModel.from_pretrained(base, tmp_path)
    assert torch.allclose(theirs(x), model(x), atol=1e-6)
    lf.load_adapter(plain := WithModule(), tmp_path)
    assert torch.equal(plain.module["q_proj"].lora_B, model.module["q_proj"].lora_B)


def test_further_names_of_a_layer_are_reported(tmp_path):
    """PEFT replaces the module under its first name alone."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model.register_module("again", model[1])
    plain = copy.deepcopy(model)
    lf.inject_(model, lf.LoRAConfig(r=2))
    nn.init.normal_(model[1].lora_B)
    report = lf.save_adapter(model, tmp_path)
    assert report.changed.keys() == {"0", "1"}
    assert report.left == {"again": "1 under another name, where PEFT will put no adapter"}
    loaded = copy.deepcopy(plain)
    lf.load_adapter(loaded, tmp_path)
    x = torch.randn(3, 8)
    torch.testing.assert_close(loaded(x), model(x))
