"""A second process reads the parameters of a model in shared memory (``model.share_memory()``) while it is trained:
asynchronous evaluation, Hogwild, rollouts on a CPU."""

import sys
import textwrap

import pytest
import torch
from adapted_nets import IN, OURS
from expert_models import METHODS, experts_model
from torch import multiprocessing

import lora_fast as lf
from lora_fast import methods as M

READER = """
    import torch

    def read(parameters, questions, answers):
        while questions.get() is not None:
            answers.put([float(p.detach().double().sum()) for p in parameters])
"""


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    """Returns a function that starts a process and returns a function with which it reads the sums of tensors."""
    folder = tmp_path_factory.mktemp("reader")
    (folder / "reading_process.py").write_text(textwrap.dedent(READER))
    sys.path.insert(0, str(folder))
    import reading_process

    spawning, processes = multiprocessing.get_context("spawn"), []

    def start(parameters):
        questions, answers = spawning.SimpleQueue(), spawning.SimpleQueue()
        process = spawning.Process(target=reading_process.read, args=(parameters, questions, answers))
        process.start()
        processes.append((process, questions))
        return lambda: (questions.put(1), answers.get())[1]

    yield start
    for process, questions in processes:
        questions.put(None)
        process.join()
    sys.path.remove(str(folder))


def sums(parameters):
    return [float(p.detach().double().sum()) for p in parameters]


def take_steps(model, methods, steps=2):
    optimizer = lf.optim.LoRAAdamW(model, lr=1e-2, methods=methods)
    for step in range(steps):
        torch.manual_seed(step)
        for p in model.parameters():
            if p.requires_grad:
                p.grad = torch.randn_like(p)
        optimizer.step()


def test_process_reads_the_values_of_every_step_and_merge(reader):
    models = {name: build() for name, build in OURS.items()}
    scaled = OURS["fused"]()
    parameters = [p.share_memory_() for model in (*models.values(), scaled) for p in model.parameters()]
    read = reader([p.detach() for p in parameters])
    assert read() == sums(parameters)
    before = sums(parameters)
    for model in models.values():
        take_steps(model, [])
    take_steps(scaled, [M.ScaLoRA(interval=1)])
    assert read() == sums(parameters) != before
    trained = sums(parameters)
    for model in models.values():
        lf.merge_(model)
    assert read() == sums(parameters) != trained
    for model in models.values():
        lf.unmerge_(model)
    assert read() == sums(parameters) == trained


def flat_parameters(model):
    """Puts all parameters into one buffer, as flat views and parameter servers do."""
    parameters = list(model.parameters())
    sizes = [p.numel() for p in parameters]
    buffer = torch.cat([p.detach().flatten() for p in parameters])
    for p, part in zip(parameters, buffer.split(sizes), strict=True):
        p.data = part.view(p.shape)
    return parameters, buffer, sizes


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("name", METHODS)
def test_flat_buffer_has_the_values_of_every_step(name, backend):
    for model in (OURS["fused"](), experts_model()[0].float()):
        parameters, buffer, sizes = flat_parameters(model)
        before = buffer.clone()
        with lf.set_backend(backend):
            take_steps(model, METHODS[name])
        parts = buffer.split(sizes)
        assert all(torch.equal(p.flatten(), part) for p, part in zip(parameters, parts, strict=True))
        assert not torch.equal(buffer, before)


def test_averaged_model_follows_the_steps():
    model = OURS["fused"]()
    averaged = torch.optim.swa_utils.AveragedModel(model)
    take_steps(model, [M.ILoRA()])
    averaged.update_parameters(model)
    assert all(map(torch.equal, averaged.module.parameters(), model.parameters()))
    x = torch.randn(3, IN)
    assert torch.equal(averaged(x), model(x))
