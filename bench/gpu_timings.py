"""What is timed on a GPU: the rows of the goals. Sections as in gpu_checks.py; a figure is a list of measure's rows."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import asdict, replace

import torch
from gpu_checks import Figures, Options
from measure import Ceilings, Provider, Setting, Unavailable, ceilings, measure, once, simply, spread, timed
from shapes import Case, Scale
from suite import module

import lora_fast as lf

SHAPES = ((4096, 4096), (4096, 14336), (14336, 4096), (4096, 1024))  # d_in, d_out
N_TOKENS, MODEL, RANK = 8192, "Llama-3-8B", 16


def _rows(case: Case, options: Options, limits: Ceilings) -> list[dict]:
    seconds = 0.0 if options.dry_run else 1.0
    setting = Setting(options.device, triton=True)
    comparison = module(case.op).build(case, setting)
    if (case.op, case.r, case.pairs) != ("layer", RANK, ((4096, 4096),)) or options.dry_run:
        comparison.providers.pop("torch.compile", None)  # compiling takes longer than all the rest of a case
    comparison.providers = {name: _surviving(build) for name, build in comparison.providers.items()}
    return [asdict(row) for row in measure(case, comparison, setting, limits, seconds, simply)]


def _surviving(build: Callable[[], Provider]) -> Callable[[], Provider]:
    """A provider that fails in its first run is not measured, with the reason; the others are."""

    def run() -> Provider:
        try:
            provider = build()
            once(provider)
            return provider
        except Unavailable:
            raise
        except Exception as error:
            raise Unavailable(f"{type(error).__name__}: {str(error)[:300]}") from error

    return run


def layers(options: Options) -> Figures:
    """The layer, forward and backward, by every provider."""
    limits = ceilings(options.device, "bfloat16", small=options.dry_run)
    yield "ceilings", limits._asdict()
    shapes, tokens = (((48, 32),), 16) if options.dry_run else (SHAPES, N_TOKENS)
    for r in (4,) if options.dry_run else (16, 64):
        for shape in shapes:
            for dropout in (0.0, 0.1):
                case = Case("layer", MODEL, (shape,), r, tokens, "bfloat16", dropout)
                yield case.name, {"rows": _rows(case, options, limits)}


def steps(options: Options) -> Figures:
    """The optimizer's step on every adapter pair of a 7B model, by every method."""
    yield from _grouped(options, ("step",))


def small(options: Options) -> Figures:
    """Grams, r×r systems, inverses and the Cayley transform of those pairs; the merge into four blocks."""
    yield from _grouped(options, ("solve", "cayley", "gram", "hadamard", "merge"))


def _grouped(options: Options, ops: tuple[str, ...]) -> Figures:
    limits = ceilings(options.device, "float32", small=options.dry_run)
    scale = Scale({}, (MODEL,), (RANK,), ("bfloat16",), (0.0,), 0, 0)
    for op in ops:
        cases = module(op).cases(scale)
        if options.dry_run:
            cases = [replace(case, pairs=((24, 16),), r=4) for case in cases[:3]]
        for case in cases:
            yield f"{op}: {case.name}", {"rows": _rows(case, options, limits)}


class Training:
    """Steps of one model on random tokens: forward, backward, optimizer."""

    def __init__(self, model: torch.nn.Module, ids: torch.Tensor, steps: int, methods=()):
        self.model, self.ids, self.steps = model, ids, steps
        self.optimizer = lf.optim.LoRAAdamW(model, lr=1e-5, methods=methods)

    def run(self) -> None:
        for _ in range(self.steps):
            self.model(input_ids=self.ids, labels=self.ids, use_cache=False).loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()


def training(options: Options) -> Figures:
    """Ten training steps of Llama-3-8B's blocks, random weights: NB-LoRA and ScaLoRA (every 10) over plain LoRA."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tiny = options.dry_run
    hidden, inner, blocks, tokens, steps = (32, 64, 1, 16, 1) if tiny else (4096, 14336, 4, 4096, 10)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=blocks,
        num_attention_heads=4 if tiny else 32,
        num_key_value_heads=2 if tiny else 8,
        vocab_size=1024,
        max_position_embeddings=8192,
    )
    torch.manual_seed(0)
    with torch.device(options.device):
        base = LlamaForCausalLM(config).bfloat16()
    ids = torch.randint(1024, (1, tokens), device=options.device)
    share = lambda: copy.deepcopy(base, {id(p): p for p in base.parameters()})
    r = 4 if options.dry_run else RANK
    sides = {}
    for name, adapter, methods in (
        ("LoRA", lf.LoRAConfig(r=r, alpha=2 * r), ()),
        ("NB-LoRA", lf.NBLoRAConfig(r=r), ()),
        ("ScaLoRA", lf.LoRAConfig(r=r, alpha=2 * r), (lf.methods.ScaLoRA(interval=10),)),
    ):
        model = share() if name != "ScaLoRA" else copy.deepcopy(base)  # its merges change the weights
        lf.inject_(model, adapter)
        training = Training(model.train(), ids, steps, methods)
        sides[name] = Provider(training.run)
    rounds = timed(sides, options.device, 0.0 if tiny else options.seconds / 3, simply)
    base_times = rounds.times("LoRA", "forward")
    for name in sides:
        times = rounds.times(name, "forward")
        ratio = spread([mine / other for mine, other in zip(times, base_times, strict=True)])
        yield name, {"microseconds a step": [t / steps for t in spread(times)], "over LoRA": ratio}
