"""Runs of ``lora-fast finetune`` on a tiny random Llama: files, figures, resuming, comparing, bad input."""

from __future__ import annotations

import gc
import json
import re
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny_model
import torch
import transformers
from finetune_runs import (
    SEQ_LEN,
    STEPS,
    Page,
    at_step,
    gpt2,
    held_out_loss_in_peft,
    invoke,
    metrics,
    refused,
    resume,
    same_result,
)
from safetensors.torch import load_file
from typer.testing import CliRunner

from lora_fast.cli import app
from lora_fast.cli.finetune import report, training
from lora_fast.cli.finetune.record import Record
from lora_fast.cli.inputs.settings import Settings
from lora_fast.cli.output import run_folder
from lora_fast.layers import fused_peft
from lora_fast.measure import machine, memory
from lora_fast.surgery import fuse

pytestmark = pytest.mark.usefixtures("unrendered")


@pytest.fixture(scope="module")
def finished(place) -> Path:
    """The folder of an uninterrupted run with dropout and accumulation, which a resumed run must reproduce."""
    result = invoke(place, "--output", place / "finished", "--dropout", 0.2, "--accumulation", 2)
    assert result.exit_code == 0, result.output
    return place / "finished"


@pytest.fixture(scope="module")
def compared(place) -> Path:
    """The folder of a comparison of both engines."""
    result = invoke(place, "--output", place / "compared", "--compare", "--lr", 0.01)
    assert result.exit_code == 0, result.output
    assert "eager / fused" in result.output and "fused 14 layers" in result.output
    return place / "compared"


def test_run_records_every_step_and_both_samples(finished):
    run = metrics(finished)["runs"]["fused"]
    assert len(run["losses"]) == len(run["seconds"]) == len(run["memory"]) == STEPS
    assert [step for step, _ in run["held_out"]] == [0, 2, 3, 5, 6]
    assert run["held_out"][-1][1] < run["held_out"][0][1]
    assert run["tokens_per_step"] == 2 * 2 * SEQ_LEN
    assert run["step_time"]["p20"] <= run["step_time"]["median"] <= run["step_time"]["p80"]
    assert run["layers"] == "fused 14 layers"
    assert run["sample_before"] and run["sample_after"]
    assert torch.__version__.startswith(metrics(finished)["environment"]["versions"]["torch"])


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")  # between peft and transformers
def test_adapter_gives_the_same_held_out_loss_in_peft(place, finished):
    loss = held_out_loss_in_peft(place, finished)
    assert loss == pytest.approx(metrics(finished)["runs"]["fused"]["held_out"][-1][1], abs=1e-5)
    assert max(tensor.abs().max() for name, tensor in load_file(finished / "adapter/adapter_model.safetensors").items()
               if "lora_B" in name) > 0  # fmt: skip


def test_ctrl_c_then_resume_ends_bitwise_like_an_uninterrupted_run(place, finished, monkeypatch):
    folder = place / "interrupted"
    options = ("--output", folder, "--dropout", 0.2, "--accumulation", 2, "--save-every", 100)
    with monkeypatch.context() as patch:
        steps = at_step(patch, 3, lambda: signal.raise_signal(signal.SIGINT))
        result = invoke(place, *options)
    assert result.exit_code == 130
    assert f"lora-fast finetune --output {folder} --resume" in result.output
    assert steps == [1, 2, 3, 4]  # the signal comes after step 3, so step 4 is the current one
    assert not (folder / "metrics.json").exists()
    with monkeypatch.context() as patch:
        steps = at_step(patch, 0, None)
        result = resume(folder)
    assert result.exit_code == 0, result.output
    assert steps == [5, 6]
    same_result(finished, folder)


@pytest.mark.parametrize(("last_step", "remaining"), [(5, [3, 4, 5, 6]), (1, [1, 2, 3, 4, 5, 6])])
def test_crashed_run_resumes_from_its_last_complete_checkpoint(place, finished, monkeypatch, last_step, remaining):
    folder = place / f"crashed_{last_step}"

    def crash():
        raise RuntimeError("power cut")

    with monkeypatch.context() as patch:
        at_step(patch, last_step, crash)
        result = invoke(place, "--output", folder, "--dropout", 0.2, "--accumulation", 2, "--save-every", 2)
    assert isinstance(result.exception, RuntimeError)  # other exceptions keep their traceback
    (folder / "checkpoints/checkpoint-4" / run_folder.RECORD).unlink(
        missing_ok=True
    )  # as if the crash had come while saving
    steps = at_step(monkeypatch, 0, None)
    assert resume(folder).exit_code == 0
    assert steps == remaining
    same_result(finished, folder)


def test_ctrl_c_twice_stops_at_once_and_leaves_a_resumable_run(place, finished, monkeypatch):
    folder = place / "twice"
    with monkeypatch.context() as patch:
        patch.setattr(training, "fallbacks", lambda model: [signal.raise_signal(signal.SIGINT) for _ in range(2)])
        result = invoke(place, "--output", folder, "--dropout", 0.2, "--accumulation", 2)
    assert result.exit_code == 130 and "--resume" in result.output
    steps = at_step(monkeypatch, 0, None)
    assert resume(folder).exit_code == 0
    assert steps == []  # all steps were done
    same_result(finished, folder)


def test_resume_rejects_other_settings_and_other_data(place, finished, monkeypatch):
    folder, text = place / "differs", place / "changing.txt"
    text.write_text(tiny_model.text())
    with monkeypatch.context() as patch:
        at_step(patch, 2, lambda: signal.raise_signal(signal.SIGINT))
        assert invoke(place, "--output", folder, "--data", text).exit_code == 130
    before = sorted(folder.rglob("*"))
    refused(resume(folder, "--rank", 8), "--rank: expected 4, as in the run that is resumed, got 8")
    refused(resume(folder, "--engine", "eager"), "--engine: expected 'fused'")
    text.write_text(tiny_model.text() + "one more line that was not there before, and long enough for a block\n")
    refused(resume(folder), "--data: expected the text that the run was started with")
    refused(resume(place / "nothing"), "--resume: expected --output with the folder of an interrupted run")
    refused(CliRunner().invoke(app, ["finetune", "--resume"]), "--resume: expected --output with the folder")
    refused(resume(finished), "which has finished")
    assert sorted(folder.rglob("*")) == before


def test_ctrl_c_ends_a_process_with_exit_code_130(place):
    folder = place / "process"
    words = ["--model", place / "model", "--data", place / "text.txt", "--seq-len", "32", "--output", folder]
    command = [sys.executable, "-c", "from lora_fast.cli import main; main()", "finetune", *words, "--steps", "100000"]
    with subprocess.Popen(map(str, command), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        deadline = time.monotonic() + 120
        while not (folder / "run.json").exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        output = process.communicate(timeout=120)[0]
    assert process.returncode == 130, output
    assert f"--output {folder} --resume" in output and "Traceback" not in output
    assert run_folder.last_checkpoint(folder) is not None


@pytest.mark.parametrize(("engine", "calls"), [("fused", True), ("eager", False)])
def test_fused_op_is_called_by_the_fused_engine_only(place, tmp_path, monkeypatch, engine, calls):
    called, run = [], fused_peft.FusedLoraLinear._run

    def run_and_count(*arguments):
        called.append(1)
        return run(*arguments)

    monkeypatch.setattr(fused_peft.FusedLoraLinear, "_run", run_and_count)
    assert invoke(place, "--output", tmp_path / "out", "--steps", 1, "--engine", engine).exit_code == 0
    assert bool(called) is calls
    assert list(metrics(tmp_path / "out")["runs"]) == [engine]


def test_first_model_is_freed_before_the_second_is_loaded(place, tmp_path, monkeypatch):
    prepare, models = training.prepare, []

    def prepare_and_watch(context, run):
        assert [model() for model in models] == [None] * len(models)
        model, layers = prepare(context, run)
        models.append(weakref.ref(model))
        return model, layers

    monkeypatch.setattr(training, "prepare", prepare_and_watch)
    assert invoke(place, "--output", tmp_path / "out", "--steps", 1, "--compare").exit_code == 0
    assert len(models) == 2


def test_engines_train_alike(compared):
    figures = metrics(compared)
    fused, eager = figures["runs"]["fused"], figures["runs"]["eager"]
    assert figures["comparison"]["ran_first"] == "fused"
    assert figures["comparison"]["max_loss_difference"] < 1e-5
    assert fused["losses"][0] - fused["losses"][-1] > 0.1  # without learning, agreement would mean nothing
    assert eager["layers"] == "PEFT's own layers"
    a, b = (load_file(compared / engine / "adapter/adapter_model.safetensors") for engine in ("fused", "eager"))
    assert all((a[name] - b[name]).abs().max() < 1e-4 for name in a)


def test_report_refers_to_no_other_file_and_shows_both_curves(compared):
    text = (compared / "report.html").read_text()
    page = Page(text)
    assert page.addresses == [] and "@import" not in text and "<script" not in text and "url(http" not in text
    assert len(page.ids) == len(set(page.ids))
    words = " ".join(page.words)
    for expected in ("fused, training", "eager, training", "fused, held out", "eager, held out", "MiB", "Sample"):
        assert expected in words
    loss = text[text.index('id="loss-') : text.index('id="time-')]
    assert len(re.findall(r'id="loss-line2d_\d+"', loss)) >= 4
    assert "currentColor" in loss and "#010203" not in text


@pytest.mark.usefixtures("rendered")
def test_report_escapes_hostile_text(compared):
    record = Record(**json.loads((compared / "fused" / run_folder.RECORD).read_text()))
    record.sample_after = "<script>alert(1)</script>"
    page = report.html(Settings(model="<b>m"), [record], machine.environment(), "<i>")
    assert "<script" not in page and "<b>m" not in page and "<i>" not in page


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--rank", 0), "--rank: expected an integer from 1 to 256, got 0"),
        (("--rank", 257), "--rank: expected an integer from 1 to 256, got 257"),
        (("--alpha", 0), "--alpha: expected a finite number above 0, got 0.0"),
        (("--alpha", "nan"), "--alpha: expected a finite number above 0, got nan"),
        (("--alpha", "inf"), "--alpha"),
        (("--dropout", -0.1), "--dropout: expected a probability"),
        (("--dropout", 1), "--dropout: expected a probability"),
        (("--dropout", "nan"), "--dropout: expected a probability"),
        (("--lr", 0), "--lr: expected a finite number above 0"),
        (("--learning-rate", "nan"), "--lr: expected a finite number above 0"),
        (("--steps", 0), "--steps: expected an integer of at least 1, got 0"),
        (("--epochs", 1), "--steps: expected either --steps or --epochs, got both"),
        (("--seq-len", 1), "--seq-len: expected an integer of at least 2, got 1"),
        (("--seq-len", 129), "--seq-len: expected at most the model's 128 positions, got 129"),
        (("--batch", 0), "--batch: expected an integer of at least 1"),
        (("--accumulation", 0), "--accumulation: expected an integer of at least 1"),
        (("--save-every", 0), "--save-every: expected an integer of at least 1"),
        (("--seed", -1), "--seed: expected an integer from 0"),
        (("--engine", "warp"), "--engine: expected one of fused, eager, got 'warp'"),
        (("--dtype", "int8"), "--dtype: expected one of auto, float32, bfloat16, float16, got 'int8'"),
        (("--targets", "q_proj,nope"), "--targets: expected all-linear, or some of q_proj, k_proj, v_proj, o_proj"),
        (("--targets", "q_proj,"), "--targets: expected all-linear, or module names separated by commas"),
        (("--prompt", "x" * 100), "--prompt: expected at most 88 tokens"),
        (("--prompt", " "), "--prompt: expected some text"),
        (("--data", "missing.txt"), "--data: expected a file of text or of JSON lines, got 'missing.txt': nothing"),
        (("--data", "."), "--data: expected a file"),
        (("--data", "empty.txt"), "which is empty"),
        (("--data", "binary.txt"), "--data: expected UTF-8 text"),
        (("--data", "nul.txt"), "NUL bytes: a binary file"),
        (("--data", "short.txt"), "--data: expected text for at least two blocks of --seq-len 32 tokens"),
        (("--data", "broken.jsonl"), "--data: expected line 3 to be JSON"),
        (("--data", "shapeless.jsonl"), '--data: expected line 2 to be {"text": …}'),
        (("--data", "list.jsonl"), "--data: expected line 1 to be"),
        (("--data", "chat.jsonl"), "--data: expected a model with a chat template"),
        (("--model", "missing/folder/x"), "--model: expected an existing folder or a Hugging Face model id"),
        (("--model", "empty_folder"), "--model: expected a folder with a config.json"),
        (("--model", "bert"), "--model: expected a causal language model"),
        (("--model", "bare"), "--model: expected a model with a tokenizer"),
        (("--model", "nobody/no-such-model"), "--model: expected a folder or a hub id with a model configuration"),
        (("--output", "full"), "--output: expected a new or empty folder, got 'full', which contains other files"),
        (("--output", "short.txt"), "--output: expected a folder, got 'short.txt', which is a file"),
        (("--output", "short.txt/below"), "--output: expected a folder that can be written"),
        (("--output", "held"), "--output: expected a new or empty folder, got 'held', which already contains a run"),
    ],
    ids=lambda value: " ".join(map(str, value))[:40] if isinstance(value, tuple) else "",
)
def test_bad_input_is_named_and_writes_nothing(place, bad_files, monkeypatch, options, message):
    monkeypatch.chdir(bad_files)
    before = sorted(bad_files.rglob("*"))
    refused(invoke(place, *options), message)
    assert sorted(bad_files.rglob("*")) == before


@pytest.fixture(scope="module")
def bad_files(place, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bad")
    texts = {
        "empty.txt": " \n",
        "nul.txt": "some text\0more text",
        "short.txt": "too short",
        "broken.jsonl": '{"text": "a"}\n\n{"text": ',
        "shapeless.jsonl": '{"text": "a"}\n{"words": "b"}',
        "list.jsonl": '["a"]',
        "chat.jsonl": '{"messages": [{"role": "user", "content": "hello"}]}',
        "full/file": "",
        "held/run.json": "{}",
        "bert/config.json": json.dumps({"model_type": "bert", "architectures": ["BertModel"]}),
    }
    for name, text in texts.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    (folder / "binary.txt").write_bytes(b"\x89PNG\xff\xfe")
    (folder / "empty_folder").mkdir()
    transformers.AutoConfig.from_pretrained(place / "model").save_pretrained(folder / "bare")
    return folder


def test_model_without_a_layer_to_fuse_is_rejected_before_writing(place, tmp_path, monkeypatch):
    monkeypatch.setattr(fuse, "_unfusable", lambda layer: "quantised base")
    result = invoke(place, "--output", tmp_path / "out")
    refused(result, "--engine: expected eager where no layer can be fused", "quantised base")
    assert not (tmp_path / "out").exists()


def test_gpt2_trains_fused(place, tmp_path):
    """Its linear layers are transformers' Conv1D."""
    gpt2(tmp_path / "gpt2")
    result = invoke(place, "--model", tmp_path / "gpt2", "--output", tmp_path / "out")
    assert result.exit_code == 0 and "fused 4 layers" in result.output


def test_bfloat16_trains_on_a_cpu(place, tmp_path):
    assert invoke(place, "--output", tmp_path / "out", "--dtype", "bfloat16", "--compare").exit_code == 0
    figures = metrics(tmp_path / "out")
    fused, eager = (figures["runs"][engine]["losses"] for engine in ("fused", "eager"))
    assert fused == pytest.approx(eager, abs=0.05)
    assert figures["runs"]["fused"]["layers"] == "fused 14 layers"  # none ran PEFT's forward


def test_infinite_loss_stops_the_run(place):
    result = invoke(place, "--output", place / "diverged", "--lr", 1e30)
    assert result.exit_code == 1
    assert re.search(r"Error: the (held-out )?loss is (nan|inf) at step \d: try a smaller --lr", result.output)


def test_default_output_is_a_new_folder_for_each_run(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for n in (1, 2):
        assert invoke(place, "--steps", 1).exit_code == 0
        assert (tmp_path / f"runs/model-text-{n}/report.html").exists()


def test_chat_rows_are_formatted_by_the_template(place, tmp_path):
    tiny_model.save(tmp_path / "chatty", tiny_model.CHAT_TEMPLATE)
    turns = [[{"role": "user", "content": f"say {i}"}, {"role": "bot", "content": "it"}] for i in range(40)]
    rows = [{"messages": turn} for turn in turns]
    (tmp_path / "chat.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = ("--model", tmp_path / "chatty", "--data", tmp_path / "chat.jsonl", "--output", tmp_path / "out")
    assert invoke(place, *options, "--steps", 1).exit_code == 0
    assert "<user>say" in metrics(tmp_path / "out")["prompt"] or "<bot>" in metrics(tmp_path / "out")["prompt"]


def test_saved_for_backward_counts_distinct_storages_without_the_model():
    class Squares(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(3, 5))

        def forward(self, x):
            y = x @ self.weight  # saves x, and the weight, which does not count
            return SimpleNamespace(loss=(y * y).sum())  # saves y twice

    assert memory.saved_for_backward(Squares(), {"x": torch.ones(7, 3)}) == 4 * (7 * 3 + 7 * 5)


def test_saved_for_backward_frees_what_it_counted():
    """Otherwise every run of a comparison would keep its weights and activations in memory."""

    class Exp(torch.nn.Linear):
        def forward(self, x):
            return SimpleNamespace(loss=super().forward(x).exp().sum())  # exp saves its result for backward

    model = Exp(3, 5)
    weight = weakref.ref(model.weight)
    memory.saved_for_backward(model, {"x": torch.ones(7, 3)})
    del model
    gc.collect()
    assert weight() is None


def test_help_has_examples_and_every_option():
    runner = CliRunner()
    overview, details = (runner.invoke(app, [*words, "--help"]) for words in ([], ["finetune"]))
    assert overview.exit_code == details.exit_code == 0
    assert "Examples" in overview.output and "lora-fast finetune --compare" in details.output
    options = {option for line in details.output.splitlines() for option in re.findall(r"^│ (--[\w-]+)", line)}
    named = {"--" + name.replace("_", "-") for name in Settings().as_dict()}
    assert named | {"--output", "--resume"} <= options
