"""LoRAAdamW as a torch optimizer: its state, resuming, groups and models, and the arguments that it refuses."""

import copy
import gc
import io
import math
import warnings
import weakref

import numpy as np
import peft
import pytest
import tiny
import torch
from adapter_pairs import bits, pairs, same, set_gradients, train
from torch import nn

import lora_fast as lf
from lora_fast import methods as M

EVERY = {
    "plain": [],
    "lora+": [M.LoRAPlus(4.0)],
    "scale-reg": [M.ScaleReg(lam=0.05)],
    "scaled adamw": [M.ScaledAdamW()],
    "ilora lora+": [M.ILoRA(lam=1.0), M.LoRAPlus(4.0)],
    "pilora": [M.PiLoRA()],
    "balora": [M.BaLoRA()],
    "scalora": [M.ScaLoRA(interval=3)],
    "scalora compensated": [M.ScaLoRA(interval=3, rounding="compensated")],
    "lora-rite": [M.LoRARITE()],
    "lora-rite ilora": [M.LoRARITE(), M.ILoRA(lam=1.0)],
    "lora-muon": [M.LoRAMuon()],
    "ref-lora": [M.RefLoRA()],
}


every_method = pytest.mark.parametrize("methods", EVERY.values(), ids=EVERY.keys())


@pytest.mark.parametrize("methods", [[], [M.ILoRA(lam=0.0)]], ids=["listed", "stacked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_step_without_methods_is_bitwise_torchs_fused_adamw(dtype, methods):
    ours, theirs = pairs(dtype=dtype), pairs(dtype=dtype)
    settings = {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-7, "weight_decay": 0.1}
    optimizer = lf.optim.LoRAAdamW(ours, methods=methods, rounding="nearest", **settings)
    reference = torch.optim.AdamW([p for pair in theirs for p in pair[:2]], fused=True, **settings)
    for i in range(20):
        set_gradients(ours, i)
        for (a, b, *_), (x, y, *_) in zip(ours, theirs, strict=True):
            x.grad, y.grad = a.grad.clone(), b.grad.clone()
        optimizer.step()
        reference.step()
        assert same(bits(ours), bits(theirs))


def test_state_has_the_form_of_torchs_adamw():
    chosen = pairs()
    optimizer = lf.optim.LoRAAdamW(chosen, methods=[M.ILoRA()])
    assert optimizer.state_dict()["state"] == {}
    train(optimizer, chosen, 2)
    state = optimizer.state_dict()["state"]
    assert len(state) == 8
    parameters = [p for pair in chosen for p in pair[:2]]
    for i, p in enumerate(parameters):
        assert set(state[i]) == {"step", "exp_avg", "exp_avg_sq"}
        assert state[i]["exp_avg"].shape == p.shape and state[i]["step"].item() == 2
    reference = torch.optim.AdamW(parameters, fused=True)
    reference.load_state_dict(
        lf_state := {**optimizer.state_dict(), "param_groups": reference.state_dict()["param_groups"]}
    )
    assert torch.equal(reference.state[parameters[0]]["exp_avg"], lf_state["state"][0]["exp_avg"])


@every_method
def test_steps_are_bitwise_equal_on_repeat(methods):
    ends = []
    for _ in range(2):
        chosen = pairs(weight_dtype=torch.bfloat16)
        train(optimizer := lf.optim.LoRAAdamW(chosen, lr=1e-2, methods=methods), chosen, 12)
        ends.append(bits(chosen, optimizer))
    assert same(*ends)


@every_method
def test_training_resumes_bitwise_at_each_of_50_steps(methods):
    """From every step's checkpoint, the next step is bitwise the same. By induction, so are all later ones."""
    straight = pairs(weight_dtype=torch.bfloat16)
    whole = lf.optim.LoRAAdamW(straight, lr=1e-2, methods=methods)
    for at in range(50):
        torch.save(whole.state_dict(), file := io.BytesIO())
        copied = lambda p: nn.Parameter(p.detach().clone())
        resumed = [(copied(a), copied(b), s, w.clone()) for a, b, s, w in straight]
        after = lf.optim.LoRAAdamW(resumed, lr=1e-2, methods=methods)
        file.seek(0)
        after.load_state_dict(torch.load(file, weights_only=True))
        train(after, resumed, 1, first=at)
        train(whole, straight, 1, first=at)
        assert same(bits(straight, whole), bits(resumed, after)), f"after step {at}"


IN_16_BITS = [
    (torch.bfloat16, {}),
    (torch.bfloat16, {"rounding": "stochastic", "state_dtype": torch.float32}),
    (torch.float16, {"rounding": "stochastic"}),
    (torch.float16, {"rounding": "nearest", "state_dtype": torch.float32}),
]


@every_method
@pytest.mark.parametrize("dtype, settings", IN_16_BITS, ids=lambda value: str(value))
def test_16_bit_adapters_resume_bitwise(methods, dtype, settings):
    """From every step's checkpoint, the next step is bitwise the same."""
    straight = pairs(dtype=dtype)
    whole = lf.optim.LoRAAdamW(straight, lr=1e-2, methods=methods, **settings)
    for at in range(6):
        torch.save(whole.state_dict(), file := io.BytesIO())
        copied = lambda p: nn.Parameter(p.detach().clone())
        resumed = [(copied(a), copied(b), s, w.clone()) for a, b, s, w in straight]
        after = lf.optim.LoRAAdamW(resumed, lr=1e-2, methods=methods, **settings)
        file.seek(0)
        after.load_state_dict(torch.load(file, weights_only=True))
        train(after, resumed, 1, first=at)
        train(whole, straight, 1, first=at)
        assert same(bits(straight, whole), bits(resumed, after)), f"after step {at}"


@every_method
def test_moved_parameters_are_stacked_anew(methods):
    still, moved = pairs(), pairs()
    reference, optimizer = (lf.optim.LoRAAdamW(chosen, lr=1e-2, methods=methods) for chosen in (still, moved))
    for i in range(5):
        train(reference, still, 1, first=i)
        train(optimizer, moved, 1, first=i)
        moved[i % 4][i % 2].data = moved[i % 4][i % 2].data.clone()
    assert same(bits(still), bits(moved))


@every_method
def test_step_skipped_by_the_scaler_changes_nothing(methods):
    chosen = pairs()
    optimizer = lf.optim.LoRAAdamW(chosen, lr=1e-2, methods=methods)
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    for i in range(6):
        set_gradients(chosen, i, scale=16.0)
        scaler.scale(torch.zeros(()))  # initialises the scaler
        bad = i in (0, 3)
        if bad:
            chosen[1][0].grad[0, 0] = math.nan
        before, saved = bits(chosen, optimizer), copy.deepcopy(optimizer.state_dict())
        scaler.step(optimizer)
        assert same(before, bits(chosen, optimizer)) == bad
        if bad:
            assert saved["param_groups"] == optimizer.state_dict()["param_groups"]
        scaler.update(16.0)


@pytest.mark.parametrize("name", [name for name in EVERY if "lora-rite" not in name and "scalora" not in name])
def test_pairs_without_gradients_rest_while_others_train(name):
    """Each pair trains as if it were alone. LoRA-RITE's pairs share a norm and ScaLoRA's share κ, so both are left
    out."""
    methods = EVERY[name]
    together, alone = pairs(), pairs()
    optimizer = lf.optim.LoRAAdamW(together, lr=1e-2, methods=methods)
    single = [lf.optim.LoRAAdamW([pair], lr=1e-2, methods=methods) for pair in alone]
    for i in range(8):
        set_gradients(together, i)
        set_gradients(alone, i)
        for j in range(4):
            if (i + j) % 3 == 0:
                together[j][0].grad = together[j][1].grad = None
            else:
                single[j].step()
        optimizer.step()
    for got, want in zip(bits(together), bits(alone), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    assert {int(optimizer.state[a]["step"]) for a, *_ in together} == {5, 6}


@every_method
@pytest.mark.parametrize("case", ["b = 0", "zero lr", "zero gradient", "rank-deficient gradient"])
def test_parameters_stay_finite_in_edge_cases(methods, case):
    chosen = pairs(zero_b=case == "b = 0")
    optimizer = lf.optim.LoRAAdamW(chosen, lr=0.0 if case == "zero lr" else 1e-2, methods=methods)
    start = bits(chosen)
    for i in range(5):
        set_gradients(chosen, i, scale=0.0 if case == "zero gradient" else 1.0)
        if case == "rank-deficient gradient":
            for a, b, *_ in chosen:
                a.grad[1:], b.grad[:, 1:] = 0, 0
        optimizer.step()
    assert all(torch.isfinite(x).all() for x in bits(chosen, optimizer))
    changes_the_split = any(isinstance(method, (M.BaLoRA, M.ScaLoRA)) for method in methods)
    if case == "zero lr" and not changes_the_split:
        assert same(start, bits(chosen))
    if case == "b = 0":
        assert all(b.norm() > 0 and a.norm() > 0 for a, b, *_ in chosen)


def test_gradient_of_one_factor_only_is_refused_by_methods():
    chosen = pairs()
    set_gradients(chosen, 0)
    chosen[2][1].grad = None
    before = bits(chosen)
    with pytest.raises(lf.ArgumentError, match=r"model\[2\].lora_B.grad: expected a gradient \(ILoRA"):
        lf.optim.LoRAAdamW(chosen, methods=[M.ILoRA()]).step()
    assert same(before, bits(chosen))
    lf.optim.LoRAAdamW(chosen).step()
    assert torch.equal(chosen[2][1], before[7]) and not torch.equal(chosen[2][0], before[6])


def test_groups_work_with_schedulers_and_zero_grad():
    chosen = pairs()
    optimizer = lf.optim.LoRAAdamW(chosen, lr=0.1, methods=[M.LoRAPlus(8.0), M.ILoRA()])
    assert [(len(group["params"]), group["lr"]) for group in optimizer.param_groups] == [(4, 0.1), (4, 0.8)]
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 0.5**i)
    train(optimizer, chosen, 1)
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.05, 0.4]
    optimizer.zero_grad()
    assert chosen[0][0].grad is None
    before = bits(chosen)
    assert optimizer.step(lambda: torch.tensor(3.0)) == 3.0
    assert same(before, bits(chosen))
    assert len(lf.optim.LoRAAdamW(chosen).param_groups) == 1


def test_closure_runs_with_gradients_enabled():
    model = tiny.injected_llama()
    optimizer = lf.optim.LoRAAdamW(model, lr=1e-2, methods=[M.ILoRA()])
    batch, losses = tiny.batch(), []

    def closure():
        optimizer.zero_grad()
        loss = tiny.loss_of(model, batch)
        loss.backward()
        return loss

    for _ in range(4):
        losses.append(optimizer.step(closure).item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("methods", [[], [M.LoRAPlus(2.0)], [M.PiLoRA()]], ids=["plain", "lora+", "pilora"])
def test_add_param_group_takes_pairs_and_other_parameters(methods):
    chosen, extra = pairs(), pairs(seed=1, shapes=[(5, 6, 2)])
    optimizer = lf.optim.LoRAAdamW(chosen, methods=methods)
    optimizer.add_param_group({"params": extra, "lr": 0.5, "weight_decay": 0.0})
    other = nn.Parameter(torch.ones(3))
    optimizer.add_param_group({"params": [other]})
    other.grad = torch.ones(3)
    start = bits(chosen + extra)
    train(optimizer, chosen + extra, 1)
    assert not any(
        torch.equal(x, y) for i, (x, y) in enumerate(zip(start, bits(chosen + extra), strict=True)) if i % 3 < 2
    )
    assert 0.4 < (extra[0][0].detach() - start[-3]).abs().median() < 2.1
    assert torch.allclose(other, torch.full((3,), 1 - 2e-4))
    with pytest.raises(lf.ArgumentError, match="a tensor of its own"):
        optimizer.add_param_group({"params": chosen[:1]})


@pytest.mark.parametrize("kind", ["lora_fast", "peft", "fused peft"])
def test_optimizer_trains_models_of_every_kind(kind, tmp_path):
    model = tiny.injected_llama() if kind == "lora_fast" else tiny.peft_llama()
    if kind == "fused peft":
        lf.fuse_(model)
    optimizer = lf.optim.LoRAAdamW(model, lr=1e-2, methods=[M.PiLoRA(), M.LoRAPlus(2.0)])
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 2 * 14
    losses = []
    for _ in range(6):
        loss = tiny.loss_of(model, tiny.batch())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    lf.save_adapter(model, tmp_path / "ours")
    fresh = tiny.injected_llama() if kind == "lora_fast" else tiny.peft_llama()
    lf.load_adapter(fresh, tmp_path / "ours")
    assert (
        torch.equal(fresh(input_ids=tiny.batch()).logits, model(input_ids=tiny.batch()).logits) or kind == "fused peft"
    )
    if kind != "lora_fast":
        model.save_pretrained(tmp_path / "theirs")
        size = (tmp_path / "theirs" / "adapter_model.safetensors").stat().st_size
        assert size < 1.2 * (tmp_path / "ours" / "adapter_model.safetensors").stat().st_size
    clone = copy.deepcopy(model)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), clone.parameters(), strict=True))


def test_other_parameters_have_a_group_of_their_own():
    model = tiny.peft_llama(targets=["q_proj"], modules_to_save=["lm_head"])
    optimizer = lf.optim.LoRAAdamW(model, lr=1e-2, methods=[M.ILoRA()])
    assert [len(group["params"]) for group in optimizer.param_groups] == [4, 1]
    head = optimizer.param_groups[1]["params"][0]
    before = head.detach().clone()
    tiny.loss_of(model, tiny.batch()).backward()
    optimizer.step()
    assert not torch.equal(head, before) and set(optimizer.state[head]) == {"step", "exp_avg", "exp_avg_sq"}


@every_method
def test_deepcopy_of_the_optimizer_continues_bitwise(methods):
    chosen = pairs()
    optimizer = lf.optim.LoRAAdamW(chosen, lr=1e-2, methods=methods)
    train(optimizer, chosen, 2)
    twin, pairs_of_twin = copy.deepcopy((optimizer, chosen))
    train(optimizer, chosen, 4, first=2)
    train(twin, pairs_of_twin, 4, first=2)
    assert same(bits(chosen, optimizer), bits(pairs_of_twin, twin))


def wrong_pairs():
    a, b = nn.Parameter(torch.ones(4, 6)), nn.Parameter(torch.ones(5, 4))
    return {
        "unpaired": ([(a, None)], "both factors"),
        "no pair": ([a, b], "a pair"),
        "ranks differ": ([(a, nn.Parameter(torch.ones(5, 3)))], r"shape \(d_out, 4\)"),
        "not a matrix": ([(nn.Parameter(torch.ones(4)), b)], "a floating-point matrix"),
        "dtypes differ": ([(a, nn.Parameter(torch.ones(5, 4).double()))], "torch.float32 on cpu"),
        "shared": ([(a, b), (a, nn.Parameter(torch.ones(5, 4)))], r"that model\[0\].lora_A also holds"),
        "weight": ([(a, b, 1.0, torch.ones(6, 5))], r"shape \(5, 6\)"),
        "scaling": ([(a, b, math.nan)], "a finite number"),
        "scaling of two": ([(a, b, torch.ones(2))], "a finite number"),
        "weight of a number": ([(a, b, 1.0, 3)], r"weight: expected a torch\.Tensor"),
        "frozen": ([(a.detach(), b.detach())], "a pair with a trained factor"),
        "nothing": ([], "at least one pair, got none"),
        "empty generator": ((pair for pair in ()), "at least one pair, got none"),
        "None": (None, "a list of pairs"),
        "number": (3, "a list of pairs"),
        "dict": ({"params": [a]}, "a list of pairs"),
        "parameters": (nn.Linear(2, 2).parameters(), "the model itself in place of its parameters"),
        "named parameters": (nn.Linear(2, 2).named_parameters(), "the model itself in place of its parameters"),
        "torch's groups": ([{"params": [a, b]}], "a pair"),
    }


@pytest.mark.parametrize("case", wrong_pairs())
def test_pairs_that_do_not_fit_are_refused(case):
    model, message = wrong_pairs()[case]
    with pytest.raises(lf.ArgumentError, match=message):
        lf.optim.LoRAAdamW(model)


def test_frozen_factor_is_refused_by_methods():
    chosen = pairs()
    chosen[1][0].requires_grad_(False)
    with pytest.raises(lf.ArgumentError, match=r"model\[1\].lora_A: expected a trained factor"):
        lf.optim.LoRAAdamW(chosen, methods=[M.BaLoRA()])
    assert len(lf.optim.LoRAAdamW(chosen).param_groups[0]["params"]) == 7


@pytest.mark.parametrize(
    "name, value",
    [
        ("lr", -1.0),
        ("lr", math.nan),
        ("lr", torch.tensor(-1.0)),
        ("lr", torch.tensor(math.nan)),
        ("lr", torch.tensor([math.inf])),
        ("lr", torch.tensor([0.1, 0.2])),
        ("lr", np.float64("nan")),
        ("lr", np.float32(-1.0)),
        ("lr", np.array([0.1])),
        ("lr", np.bool_(True)),
        ("lr", "0.1"),
        ("betas", (0.9, 1.0)),
        ("betas", (torch.tensor(1.0), torch.tensor(0.9))),
        ("betas", (np.float32("nan"), 0.9)),
        ("betas", 0.9),
        ("eps", -1),
        ("eps", torch.tensor(-1.0)),
        ("weight_decay", math.inf),
        ("weight_decay", np.float64("inf")),
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(name, value):
    with pytest.raises(lf.ArgumentError, match=f"^{name}: expected"):
        lf.optim.LoRAAdamW(pairs(), **{name: value})
    optimizer = lf.optim.LoRAAdamW(pairs())
    with pytest.raises(lf.ArgumentError, match=f"^{name}: expected"):
        optimizer.add_param_group({"params": pairs(seed=1), name: value})
    assert len(optimizer.param_groups) == 1


EQUAL_SETTINGS = {  # settings in other types than Python's numbers, which torch's AdamW takes, and these numbers
    "lr of numpy": ({"lr": np.float32(0.25)}, {"lr": 0.25}),
    "lr in an array": ({"lr": np.array(0.01)}, {"lr": 0.01}),
    "lr in a tensor": ({"lr": torch.tensor(0.25)}, {"lr": 0.25}),
    "lr in a tensor of one element": ({"lr": torch.tensor([0.25], dtype=torch.float64)}, {"lr": 0.25}),
    "betas of numpy": ({"betas": (np.float64(0.8), np.float64(0.9))}, {"betas": (0.8, 0.9)}),
    "betas in tensors": ({"betas": (torch.tensor(0.75), torch.tensor([0.5]))}, {"betas": (0.75, 0.5)}),
    "eps of numpy": ({"eps": np.float64(1e-3)}, {"eps": 1e-3}),
    "weight decay of numpy": ({"weight_decay": np.float32(0.5)}, {"weight_decay": 0.5}),
}


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("case", EQUAL_SETTINGS)
@pytest.mark.parametrize("methods", [[], [M.ILoRA(), M.LoRAPlus(2.0)]], ids=["plain", "ilora lora+"])
def test_settings_may_be_numbers_of_numpy_and_tensors(methods, case, backend):
    """In the constructor, and written into a group between two steps, as schedulers do."""
    given, numbers = EQUAL_SETTINGS[case]
    ends = []
    for settings in (given, numbers):
        for is_late in (False, True):
            chosen = pairs(shapes=[(12, 20, 4)])
            with lf.set_backend(backend):
                optimizer = lf.optim.LoRAAdamW(chosen, methods=methods, **({} if is_late else settings))
                train(optimizer, chosen, 1)
                for group in optimizer.param_groups if is_late else ():
                    group.update(settings)
                train(optimizer, chosen, 1, first=1)
            ends.append(bits(chosen))
    for got, want in zip(ends[:2], ends[2:], strict=True):
        # torch's fused AdamW has a kernel of its own for a learning rate in a tensor.
        assert same(got, want) or (backend == "torch" and "lr in a tensor" in case)
        for x, y in zip(got, want, strict=True):
            torch.testing.assert_close(x, y)


def test_learning_rate_in_a_tensor_may_change_in_place():
    chosen, others = pairs(), pairs()
    lr = torch.tensor([0.25])
    optimizer, reference = lf.optim.LoRAAdamW(chosen, lr=lr), lf.optim.LoRAAdamW(others, lr=0.25)
    for i in range(2):
        train(optimizer, chosen, 1, first=i)
        train(reference, others, 1, first=i)
        lr.fill_(0.125)
        reference.param_groups[0]["lr"] = 0.125
    for x, y in zip(bits(chosen), bits(others), strict=True):
        torch.testing.assert_close(x, y)


VARIANTS = [("maximize", True), ("amsgrad", True), ("differentiable", True), ("decoupled_weight_decay", False)]


@pytest.mark.parametrize("methods", [[], [M.ILoRA()]], ids=["plain", "ilora"])
@pytest.mark.parametrize("name, value", VARIANTS, ids=[name for name, _ in VARIANTS])
def test_variants_of_adamw_are_refused_before_anything_changes(name, value, methods):
    chosen, extra = pairs(), pairs(seed=1)
    optimizer = lf.optim.LoRAAdamW(chosen, lr=0.1, methods=methods)
    train(optimizer, chosen, 1)
    refused = pytest.raises(lf.ArgumentError, match=f"^{name}: expected {not value} .*, got {value}")
    with refused:
        optimizer.add_param_group({"params": extra, name: value})
    with refused:
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))], name: value})
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0] |= {name: value, "lr": 7.0}
    with refused:
        optimizer.load_state_dict(saved)
    assert len(optimizer.param_groups) == 1 and optimizer.param_groups[0]["lr"] == 0.1
    optimizer.param_groups[0][name] = value
    set_gradients(chosen, 1)
    before = bits(chosen, optimizer)
    with refused:
        optimizer.step()
    assert same(before, bits(chosen, optimizer))
    optimizer.param_groups[0][name] = not value
    optimizer.step()
    assert not same(before, bits(chosen, optimizer))


@pytest.mark.parametrize("amsgrad", [False, True], ids=["adamw", "amsgrad"])
def test_state_of_torchs_adamw_continues_unless_it_is_of_a_variant(amsgrad):
    ours, theirs = pairs(), pairs()
    options = {"lr": 0.1, "weight_decay": 0.0, "foreach": True, "capturable": False}
    reference = torch.optim.AdamW([p for pair in theirs for p in pair[:2]], amsgrad=amsgrad, **options)
    train(reference, theirs, 2)
    optimizer = lf.optim.LoRAAdamW(ours)
    saved = reference.state_dict()
    if amsgrad:
        with pytest.raises(lf.ArgumentError, match=r"^amsgrad: expected False"):
            optimizer.load_state_dict(saved)
        saved["param_groups"][0]["amsgrad"] = False
        with pytest.raises(
            lf.ArgumentError, match=r"^state_dict: expected a state without amsgrad, got max_exp_avg_sq"
        ):
            optimizer.load_state_dict(saved)
        assert not optimizer.state
        return
    optimizer.load_state_dict(saved)
    for (a, b, *_), (x, y, *_) in zip(ours, theirs, strict=True):
        a.data.copy_(x.data), b.data.copy_(y.data)
    train(optimizer, ours, 2, first=2)
    train(reference, theirs, 2, first=2)
    for x, y in zip(bits(ours), bits(theirs), strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("step", ["int", "float64", "int64"])
@pytest.mark.parametrize(
    "trained, saved",
    [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16), (torch.float16, torch.float32)],
    ids=["bfloat16 from float32", "float32 from bfloat16", "float16 from float32"],
)
@pytest.mark.parametrize("methods", [[], [M.ILoRA()]], ids=["plain", "ilora"])
def test_state_of_another_dtype_trains_as_if_it_had_been_cast(methods, trained, saved, step, backend):
    """Step counts may be numbers, as older versions of torch saved them. A parameter without a pair trains, too."""
    ends = []
    for is_cast in (False, True):
        chosen, other = pairs(dtype=trained, shapes=[(12, 20, 4)]), nn.Parameter(torch.ones(3, dtype=trained))
        source, source_other = pairs(dtype=saved, shapes=[(12, 20, 4)]), nn.Parameter(torch.ones(3, dtype=saved))
        with lf.set_backend(backend):
            optimizers = []
            for layers, parameter in ((source, source_other), (chosen, other)):
                optimizers.append(lf.optim.LoRAAdamW(layers, lr=1e-2, methods=methods))
                optimizers[-1].add_param_group({"params": [parameter]})
                parameter.grad = torch.ones_like(parameter)
            first, optimizer = optimizers
            train(first, source, 2)
            state_dict = copy.deepcopy(first.state_dict())
            for state in state_dict["state"].values():
                moments = {
                    name: state[name].to(trained) if is_cast else state[name] for name in state if name != "step"
                }
                count = {"int": int, "float64": torch.Tensor.double, "int64": torch.Tensor.long}[step](state["step"])
                state |= moments | ({} if is_cast else {"step": count})
            optimizer.load_state_dict(state_dict)
            train(optimizer, chosen, 2, first=2)
            assert int(optimizer.state[chosen[0][0]]["step"]) == int(optimizer.state[other]["step"]) == 4
        ends.append([*bits(chosen), other.detach()])
    assert same(*ends)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("name", ["exp_avg", "exp_avg_sq", "step"])
@pytest.mark.parametrize("methods", [[], [M.ILoRA()]], ids=["plain", "ilora"])
def test_state_may_be_replaced_by_one_of_another_dtype(methods, name, backend):
    """Between two steps, as by code that moves or casts an optimizer's state."""
    ends = []
    for is_cast in (False, True):
        chosen = pairs(dtype=torch.bfloat16, shapes=[(12, 20, 4)] * 2)
        with lf.set_backend(backend):
            optimizer = lf.optim.LoRAAdamW(chosen, lr=1e-2, methods=methods)
            train(optimizer, chosen, 1)
            if is_cast:
                optimizer.state[chosen[0][0]][name] = optimizer.state[chosen[0][0]][name].double()
            train(optimizer, chosen, 2, first=1)
        ends.append(bits(chosen))
    assert same(*ends)


def test_state_of_another_optimizer_is_refused():
    chosen = pairs()
    saved = lf.optim.LoRAAdamW(chosen, methods=[M.ILoRA(lam=1.0)])
    train(saved, chosen, 2)
    state = saved.state_dict()
    cases = {
        "methods": lf.optim.LoRAAdamW(pairs(), methods=[M.BaLoRA()]),
        "lam=2.0": lf.optim.LoRAAdamW(pairs(), methods=[M.ILoRA(lam=2.0)]),
        "moments of shape": lf.optim.LoRAAdamW(pairs()[::-1], methods=[M.ILoRA(lam=1.0)]),
        "groups of": lf.optim.LoRAAdamW(pairs()[:2], methods=[M.ILoRA(lam=1.0)]),
    }
    for message, optimizer in cases.items():
        with pytest.raises(lf.ArgumentError, match=f"^state_dict: .*{message}"):
            optimizer.load_state_dict(state)
        assert not optimizer.state
    model, other = tiny.peft_llama(targets=["q_proj"]), tiny.peft_llama(targets=["o_proj"])
    with pytest.raises(lf.ArgumentError, match=r"parameter .*o_proj"):
        lf.optim.LoRAAdamW(other).load_state_dict(lf.optim.LoRAAdamW(model).state_dict())


@pytest.mark.parametrize("methods", [[], [M.ILoRA()], [M.ScaleReg(decoupled=True)]], ids=["plain", "ilora", "reg"])
def test_gradients_may_have_another_memory_order(methods):
    """torch's fused AdamW on a CPU reads them in memory order, whatever their strides."""
    straight, turned = pairs(), pairs()
    optimizers = [lf.optim.LoRAAdamW(chosen, lr=1e-2, methods=methods) for chosen in (straight, turned)]
    for i in range(3):
        set_gradients(straight, i)
        for (a, b, *_), (c, d, *_) in zip(straight, turned, strict=True):
            c.grad, d.grad = a.grad.T.contiguous().T, b.grad.T.contiguous().T
        for optimizer in optimizers:
            optimizer.step()
    assert same(bits(straight), bits(turned))


def test_parameters_may_have_another_memory_order():
    straight, turned = pairs(), pairs()
    turned[0][0].data = turned[0][0].data.T.contiguous().T
    for chosen in (straight, turned):
        train(lf.optim.LoRAAdamW(chosen, lr=1e-2), chosen, 3)
    assert same(bits(straight), bits(turned))


def adapted(kind):
    """Returns a small model with adapters whose b is not 0: ours, or fused ones of PEFT."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 8))
    if kind == "peft":
        model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["0", "2"], init_lora_weights=False))
        lf.fuse_(model)
        return model
    lf.inject_(model, lf.LoRAConfig(r=4, alpha=8))
    for layer in (model[0], model[2]):
        nn.init.normal_(layer.lora_B)
    return model


def swap(model, make):
    """Replaces each trained parameter of the model by ``make`` of it, as wrappers do that shard parameters. Returns old
    and new parameters."""
    swapped = {}
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None and p.requires_grad:
                swapped[p] = module._parameters[name] = make(p)
    return swapped


@pytest.mark.parametrize("methods", [[], [M.ILoRA(lam=1.0), M.LoRAPlus(2.0)]], ids=["plain", "ilora lora+"])
@pytest.mark.parametrize("kind", ["lora_fast", "peft"])
def test_methods_follow_parameters_that_a_wrapper_replaced(kind, methods):
    """After the swap, in the layers and in the groups, a step is that of an optimizer which is made for the new
    parameters."""
    model, reference = adapted(kind), adapted(kind)
    optimizer = lf.optim.LoRAAdamW(model, lr=1e-2, methods=methods)
    model(torch.ones(3, 12)).square().sum().backward()
    optimizer.step()
    swapped = swap(model, lambda p: nn.Parameter(p.detach() * 2))
    for group in optimizer.param_groups:
        group["params"] = [swapped[p] for p in group["params"]]
    reference.load_state_dict(model.state_dict())
    other = lf.optim.LoRAAdamW(reference, lr=1e-2, methods=methods)
    for trained, steps in ((model, optimizer), (reference, other)):
        trained(torch.ones(3, 12)).square().sum().backward()
        steps.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), reference.parameters(), strict=True))
    assert not any(torch.equal(p, before * 2) for before, p in swapped.items())


@pytest.mark.parametrize("kind", ["lora_fast", "peft"])
def test_parameters_replaced_in_the_layers_alone_are_refused(kind):
    model = adapted(kind)
    optimizer = lf.optim.LoRAAdamW(model)
    swapped = swap(model, lambda p: nn.Parameter(p.detach().clone()))
    model(torch.ones(3, 12)).sum().backward()
    with pytest.raises(lf.ArgumentError, match="lora_A: expected the layer's parameter in a parameter group"):
        optimizer.step()
    assert len(swapped) == 4 and not optimizer.state


@pytest.mark.parametrize("methods", [[], [M.LoRAPlus(2.0)], [M.ILoRA()]], ids=["plain", "lora+", "ilora"])
def test_flat_partitions_train_by_adamw_or_are_refused_by_name(methods):
    """DeepSpeed's ZeRO gives the optimizer one flat float32 parameter for each group."""
    model = adapted("lora_fast")
    optimizer = lf.optim.LoRAAdamW(model, lr=1e-2, methods=methods)
    flat, torchs = [], []
    for group in optimizer.param_groups:
        values = torch.cat([p.detach().flatten() for p in group["params"]])
        flat.append(nn.Parameter(values))
        torchs.append({"params": [nn.Parameter(values.clone())], "lr": group["lr"]})
        group["params"] = flat[-1:]
    reference = torch.optim.AdamW(torchs, lr=1e-2, weight_decay=0.0, fused=True)
    for p, group in zip(flat, torchs, strict=True):
        p.grad = torch.linspace(-1, 1, p.numel())
        group["params"][0].grad = p.grad.clone()
    if methods == [M.ILoRA()]:
        before = flat[0].detach().clone()
        with pytest.raises(lf.ArgumentError, match=r"param_groups\[0\]\['params'\]\[0\]: expected a lora_A or lora_B"):
            optimizer.step()
        assert torch.equal(flat[0], before)
        return
    optimizer.step(), reference.step()
    assert all(torch.equal(p, group["params"][0]) for p, group in zip(flat, torchs, strict=True))


@pytest.mark.parametrize("kind", ["lora_fast", "peft"])
def test_optimizer_does_not_hold_frozen_weights(kind):
    """A wrapper that shards the weights then frees the whole ones."""
    model = adapted(kind)
    optimizer = lf.optim.LoRAAdamW(model, methods=[M.ILoRA()])
    for step in range(2):
        model(torch.ones(3, 12)).sum().backward()
        optimizer.step()
        frozen = [weakref.ref(p) for p in model.parameters() if not p.requires_grad]
        for module in model.modules():
            for name, p in module._parameters.items():
                if p is not None and not p.requires_grad:
                    module._parameters[name] = nn.Parameter(p.detach() + step, requires_grad=False)
        gc.collect()
        assert len(frozen) == 4 and not any(reference() is not None for reference in frozen)


def flatten(model):
    """Replaces the trained parameters by views of one flat parameter, as FSDP1 does with use_orig_params=False."""
    places = [(m, n, p) for m in model.modules() for n, p in m._parameters.items() if p is not None and p.requires_grad]
    model.flat = nn.Parameter(torch.cat([p.detach().flatten() for *_, p in places]))
    views = model.flat.split([p.numel() for *_, p in places])
    for (module, name, p), view in zip(places, views, strict=True):
        del module._parameters[name]
        setattr(module, name, view.view(p.shape))


@pytest.mark.parametrize("kind", ["lora_fast", "peft"])
def test_flattened_factors_train_in_an_optimizer_made_afterwards(kind):
    model = adapted(kind)
    before = lf.optim.LoRAAdamW(model)
    flatten(model)
    with pytest.raises(lf.ArgumentError, match="use_orig_params=False"):
        before.step()
    with pytest.raises(lf.ArgumentError, match="not flattened by a wrapper"):
        lf.optim.LoRAAdamW(model, methods=[M.ILoRA()])
    optimizer = lf.optim.LoRAAdamW(model, lr=1e-2)
    copied = nn.Parameter(model.flat.detach().clone())
    model.flat.grad = copied.grad = torch.linspace(-1, 1, copied.numel())
    reference = torch.optim.AdamW([copied], lr=1e-2, weight_decay=0.0, fused=True)
    optimizer.step(), reference.step()
    assert torch.equal(model.flat, copied)


@pytest.mark.parametrize("kind", ["lora_fast", "peft"])
def test_parameters_replaced_in_the_layers_after_a_step_are_refused(kind):
    model = adapted(kind)
    optimizer = lf.optim.LoRAAdamW(model)
    model(torch.ones(3, 12)).sum().backward()
    optimizer.step()
    if kind == "peft":  # the modules of an adapter of the same name are new, too
        model.delete_adapter("default")
        model.add_adapter("default", peft.LoraConfig(r=4, target_modules=["0", "2"], init_lora_weights=False))
        model.set_adapter("default")
    else:
        swap(model, lambda p: nn.Parameter(p.detach().clone()))
    model(torch.ones(3, 12)).sum().backward()
    with pytest.raises(lf.ArgumentError, match="expected the layer's parameter in a parameter group"):
        optimizer.step()


@pytest.mark.parametrize("methods", [[], [M.ILoRA()]], ids=["plain", "ilora"])
def test_groups_may_be_changed_by_hand(methods):
    """Half of the parameters move to a group with another learning rate, all leave and come back, and a group that the
    optimizer did not make trains by plain AdamW."""
    ours, theirs = pairs(), pairs()
    optimizer = lf.optim.LoRAAdamW(ours, lr=1e-2, methods=methods)
    reference = lf.optim.LoRAAdamW(theirs[:2], lr=1e-2, methods=methods)
    reference.add_param_group({"params": theirs[2:], "lr": 0.0})
    for chosen, stepped in ((ours, optimizer), (theirs, reference)):
        if stepped is optimizer:
            train(optimizer, chosen, 1)
            group = optimizer.param_groups[0]
            first, second = group["params"][:4], group["params"][4:]
            optimizer.param_groups[:] = [{**group, "params": first}, {**group, "params": second, "lr": 0.0}]
        else:
            reference.param_groups[1]["lr"] = 1e-2
            train(reference, chosen, 1)
            reference.param_groups[1]["lr"] = 0.0
        train(stepped, chosen, 2, first=1)
    assert same(bits(ours, optimizer), bits(theirs, reference))
    taken = [group["params"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["params"] = []
    before = bits(ours)
    optimizer.step()
    assert same(bits(ours), before)
    for group, parameters in zip(optimizer.param_groups, taken, strict=True):
        group["params"] = parameters
    extra = nn.Parameter(torch.ones(3))
    settings = {name: optimizer.defaults[name] for name in ("lr", "betas", "eps", "weight_decay")}
    optimizer.param_groups.append({"params": [extra], **settings})
    extra.grad = torch.ones(3)
    for chosen, stepped in ((ours, optimizer), (theirs, reference)):
        train(stepped, chosen, 1, first=3)
    assert same(bits(ours), bits(theirs)) and torch.allclose(extra, torch.full((3,), 0.99))


def test_factors_taken_out_of_a_group_are_left_alone():
    """As where another optimizer takes over a layer."""
    model = adapted("lora_fast")
    optimizer = lf.optim.LoRAAdamW(model, lr=1e-2, methods=[M.ILoRA()])
    model(torch.ones(3, 12)).sum().backward()
    optimizer.step()
    optimizer.param_groups[0]["params"] = optimizer.param_groups[0]["params"][2:]
    before = [p.detach().clone() for p in (model[0].lora_A, model[0].lora_B, model[2].lora_A)]
    model(torch.ones(3, 12)).sum().backward()
    optimizer.step()
    after = [model[0].lora_A, model[0].lora_B, model[2].lora_A]
    assert [torch.equal(p, q) for p, q in zip(before, after, strict=True)] == [True, True, False]


def test_state_that_moved_inside_its_tensors_is_used_and_cleared_state_is_free():
    chosen, others = pairs(), pairs()
    optimizers = [lf.optim.LoRAAdamW(x, lr=1e-2) for x in (chosen, others)]
    for step in range(3):
        for x, optimizer in zip((chosen, others), optimizers, strict=True):
            train(optimizer, x, 1, first=step)
        for state in optimizers[0].state.values():
            for value in state.values():
                value.data = value.data.clone()
    assert same(bits(chosen, optimizers[0]), bits(others, optimizers[1]))
    held = [weakref.ref(value) for state in optimizers[0].state.values() for value in state.values() if value.dim()]
    del state, value
    optimizers[0].state.clear()
    gc.collect()
    assert len(held) == 16 and not any(reference() is not None for reference in held)


def test_loaded_state_is_what_a_hook_makes_of_it():
    chosen = pairs()
    optimizer = lf.optim.LoRAAdamW(chosen, methods=[M.ILoRA()])
    train(optimizer, chosen, 2)
    saved = optimizer.state_dict()

    def forget_momentum(optimizer, state):
        cleared = {i: {**s, "exp_avg": torch.zeros_like(s["exp_avg"])} for i, s in state["state"].items()}
        return {**state, "state": cleared}

    resumed = lf.optim.LoRAAdamW(chosen, methods=[M.ILoRA()])
    resumed.register_load_state_dict_pre_hook(forget_momentum)
    resumed.load_state_dict(saved)
    a = chosen[0][0]
    assert not resumed.state[a]["exp_avg"].any() and torch.equal(
        resumed.state[a]["exp_avg_sq"], saved["state"][0]["exp_avg_sq"]
    )


def split(model, **second):
    """Returns Trainer's two groups: all that is decayed, and the others."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return [
        {"params": [p for name, p in trained if "norm" not in name], "weight_decay": 0.5},
        {"params": [p for name, p in trained if "norm" in name], **second},
    ]


@pytest.mark.parametrize("norms", [True, False], ids=["norms", "empty"])
@pytest.mark.parametrize("methods", [[], [M.ILoRA()], [M.LoRAPlus(2.0), M.PiLoRA()]], ids=["plain", "ilora", "pilora+"])
def test_groups_of_a_user_train_and_load_each_others_state(methods, norms):
    """In float64, where torch's AdamW is the reference of everything that no method works on."""
    models = [tiny.peft_llama(targets=["q_proj"], modules_to_save=["lm_head", "norm"] if norms else None) for _ in "ab"]
    optimizers = []
    for model in models:
        model.double()
        optimizers.append(lf.optim.LoRAAdamW(model, lr=1e-2, methods=methods, groups=split(model, lr=1e-3)))
    sizes = [len(group["params"]) for group in optimizers[0].param_groups]
    assert norms or sizes == ([2, 2, 0] if len(methods) == 2 else [4, 0])
    reference = tiny.peft_llama(targets=["q_proj"], modules_to_save=["lm_head", "norm"] if norms else None).double()
    adamw = torch.optim.AdamW(split(reference, lr=1e-3), lr=1e-2, weight_decay=0.0, fused=True)
    for step in range(3):
        for model, optimizer in ((models[0], optimizers[0]), (reference, adamw)):
            torch.manual_seed(step)
            for p in model.parameters():
                p.grad = torch.randn_like(p) if p.requires_grad else None
            optimizer.step()
        if step == 1:
            optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
            models[1].load_state_dict(models[0].state_dict())
    torch.manual_seed(2)
    for p in models[1].parameters():
        p.grad = torch.randn_like(p) if p.requires_grad else None
    optimizers[1].step()
    pairs_of_models = zip(models[0].named_parameters(), models[1].parameters(), reference.parameters(), strict=True)
    for (name, p), resumed, exact in pairs_of_models:
        assert torch.equal(p, resumed)
        assert not methods or "lora" in name or torch.equal(p, exact)
        assert methods or torch.equal(p, exact)


@pytest.mark.parametrize("named", [False, True], ids=["parameters", "named"])
def test_state_of_an_optimizer_of_all_parameters_goes_on(named):
    """PEFT's own examples give torch's AdamW the frozen parameters, too."""
    models = [tiny.peft_llama(targets=["q_proj"]) for _ in "ab"]
    parameters = models[0].named_parameters() if named else models[0].parameters()
    theirs = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0, fused=True)
    tiny.loss_of(models[0], tiny.batch()).backward()
    theirs.step()
    models[1].load_state_dict(models[0].state_dict())
    ours = lf.optim.LoRAAdamW(models[1], groups=[{"params": models[1].parameters()}])
    ours.load_state_dict(theirs.state_dict())
    for model, optimizer in zip(models, (theirs, ours), strict=True):
        optimizer.zero_grad()
        tiny.loss_of(model, tiny.batch(1)).backward()
        optimizer.step()
    tiny.assert_same_tensors(*(dict(model.named_parameters()) for model in models))


def test_groups_that_lack_a_parameter_or_have_others_are_refused():
    model = tiny.peft_llama(targets=["q_proj"])
    trained = [p for p in model.parameters() if p.requires_grad]
    cases = {
        r"^groups: expected every trained parameter of the model, got none with .*lora_B": [{"params": trained[:-1]}],
        r"^groups\[0\]\['params'\]\[4\]: expected a parameter, each of them once": [{"params": [*trained, "x"]}],
        r"^groups\[0\]\['params'\]\[4\]: .*got a view": [{"params": [*trained, trained[0] * 1]}],
        r"^groups\[1\]\['params'\]\[0\]: .*each of them once": [{"params": trained}, {"params": trained[:1]}],
        r"^groups: expected a list of dicts": trained,
        r"^groups\[0\]\['params'\]: expected an ordered list": [{"lr": 1.0}],
        r"^lr: expected": [{"params": trained, "lr": -1.0}],
        r"^amsgrad: expected False": [{"params": trained, "amsgrad": True}],
    }
    for message, groups in cases.items():
        with pytest.raises(lf.ArgumentError, match=message):
            lf.optim.LoRAAdamW(model, groups=groups)


@pytest.mark.parametrize("methods", [[], [M.ILoRA()], [M.LoRARITE()]], ids=["plain", "ilora", "lora-rite"])
def test_compiled_step_runs_eagerly_to_the_same_bits(methods):
    chosen, others = pairs(), pairs()
    optimizers = [lf.optim.LoRAAdamW(x, lr=1e-2, methods=methods) for x in (chosen, others)]
    compiled = torch.compile(lambda: optimizers[1].step())
    for step in range(2):
        for x in (chosen, others):
            set_gradients(x, step)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            optimizers[0].step(), compiled()
    assert same(bits(chosen, optimizers[0]), bits(others, optimizers[1]))
