"""LoRAAdamW's state under the wrappers of torch and accelerate: it is loaded without them, and the other way round."""

import copy
import pickle

import pytest
import torch
import torch.multiprocessing as mp
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from wrapped_states import METHODS, build, train, values, worker

import lora_fast as lf


def test_state_is_loaded_with_and_without_a_wrapper(tmp_path):
    """The worker asserts; mp.spawn raises its failures here."""
    mp.spawn(worker, (str(tmp_path),), nprocs=1)


@pytest.fixture
def accelerator():
    yield Accelerator(cpu=True)
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


@pytest.mark.parametrize("methods", METHODS, ids=["plain", "ilora lora+"])
@pytest.mark.parametrize("kind", ["LoRA", "PEFT"])
def test_checkpoint_of_accelerate_continues_bitwise(kind, methods, accelerator, tmp_path):
    model = build(kind)
    model, optimizer = accelerator.prepare(model, lf.optim.LoRAAdamW(model, lr=1e-2, methods=methods))
    train(model, optimizer, range(2))
    accelerator.save_state(str(tmp_path))
    state = copy.deepcopy(optimizer.state_dict())
    train(model, optimizer, range(2, 4))
    wanted = values(model)
    accelerator.load_state(str(tmp_path))
    plain = build(kind)
    plain.load_state_dict(model.state_dict())
    other = lf.optim.LoRAAdamW(plain, lr=1e-2, methods=methods)
    other.load_state_dict(state)
    for trained, steps in ((model, optimizer), (plain, other)):
        train(trained, steps, range(2, 4))
        assert all(map(torch.equal, values(trained), wanted))


@pytest.mark.parametrize("methods", METHODS, ids=["plain", "ilora lora+"])
@pytest.mark.parametrize("kind", ["LoRA", "PEFT"])
def test_pickled_model_and_optimizer_continue_bitwise(kind, methods):
    model = build(kind)
    optimizer = lf.optim.LoRAAdamW(model, lr=1e-2, methods=methods)
    train(model, optimizer, range(2))
    copies = pickle.loads(pickle.dumps((model, optimizer))), copy.deepcopy((model, optimizer))
    train(model, optimizer, range(2, 4))
    for other, steps in copies:
        train(other, steps, range(2, 4))
        assert all(map(torch.equal, values(other), values(model)))


@pytest.mark.parametrize("methods", METHODS, ids=["plain", "ilora lora+"])
def test_model_is_cast_before_and_after_its_state_is_saved(methods):
    """As a new optimizer's that loads the state of the cast model's parameters."""
    model = build("LoRA")
    optimizer = lf.optim.LoRAAdamW(model, lr=1e-2, methods=methods)
    train(model, optimizer, range(2))
    state = copy.deepcopy(optimizer.state_dict())
    model.double(), (other := copy.deepcopy(model))
    resumed = lf.optim.LoRAAdamW(other, lr=1e-2, methods=methods)
    resumed.load_state_dict(state)
    torch.set_default_dtype(torch.float64)
    try:
        for trained, steps in ((model, optimizer), (other, resumed)):
            train(trained, steps, range(2, 4))
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(p.dtype is torch.float64 for p in values(model))
    assert all(map(torch.equal, values(other), values(model)))
    assert all(s["exp_avg"].dtype is torch.float64 for s in optimizer.state.values())
