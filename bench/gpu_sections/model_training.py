"""Measures training steps on a GPU with random weights in Llama-3-8B's shapes: four blocks with our methods, and the
whole model with PEFT and with ours."""

from __future__ import annotations

import copy
import gc
import statistics
import time
from collections.abc import Callable

import torch

import lora_fast as lf
from gpu_sections.goals import TRAINING, WHOLE
from gpu_sections.section import Jobs, Options, describe
from gpu_sections.timings import judged
from lora_fast.measure.clock import Spread
from suite.comparison import Provider, Rounds, Unavailable, once, simply, timed
from suite.ops.providers import backend

RANK, STEPS, INTERVAL = 16, 10, 10
SEQUENCE, BATCH, ROUNDS = 4096, 2, 10
CHECKPOINTED = (0, 2, 1)  # checkpoint no block, every second block, every block; the first choice that fits is used
CHECKPOINTED_FIGURE = "checkpointed blocks, one in"
SPARE = 5 << 30  # bytes for the adapters of the other engines and their moments
MARGIN = 8  # seconds that are left at the end of the section


class Training:
    """Steps of one model on random tokens: forward, backward, optimizer."""

    def __init__(self, model: torch.nn.Module, ids: torch.Tensor, steps: int, optimizer, autocast: bool = False):
        self.model, self.ids, self.steps, self.optimizer, self.autocast = model, ids, steps, optimizer, autocast

    def run(self) -> None:
        for _ in range(self.steps):
            with torch.autocast(self.ids.device.type, torch.bfloat16, enabled=self.autocast):
                loss = self.model(input_ids=self.ids, labels=self.ids, use_cache=False).loss
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

    @property
    def provider(self) -> Provider:
        return Provider(self.run, context=lambda: backend("triton"), apart=False)


def llama(tiny: bool, blocks: int, vocabulary: int, device: torch.device) -> torch.nn.Module:
    """Builds a model of Llama-3-8B's shapes with random weights in bfloat16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, inner = (32, 64) if tiny else (4096, 14336)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=blocks,
        num_attention_heads=4 if tiny else 32,
        num_key_value_heads=2 if tiny else 8,
        vocab_size=vocabulary,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            return LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)


def copied(model: torch.nn.Module, own_weights: bool = False) -> torch.nn.Module:
    """Copies the modules. The copy shares the weights unless ``own_weights``."""
    return copy.deepcopy(model, None if own_weights else {id(p): p for p in model.parameters()}).train()


def launched(model: torch.nn.Module, optimizer, n_tokens: int, autocast: bool) -> dict:
    """Launches our kernels of a training step without torch's own work, to compile them.

    That is each distinct layer forward and backward, and the optimizer's step.
    """
    layers = [module for module in model.modules() if isinstance(module, lf.LoRALinear | lf.NBLoRALinear)]
    results = []
    for layer in {(layer.in_features, layer.out_features): layer for layer in layers}.values():
        x = torch.zeros(1, n_tokens, layer.in_features, dtype=torch.bfloat16, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            results.append(layer(x))
    torch.autograd.backward(results, [torch.zeros_like(y) for y in results])
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    optimizer.step()
    return {}


# ---- Stage 1: our methods


def training(options: Options) -> Jobs:
    """Times training steps of four of Llama-3-8B's blocks with NB-LoRA and ScaLoRA (every 10 steps) against LoRA."""
    return [(TRAINING, lambda: of_methods(options))]


def of_methods(options: Options) -> dict:
    """Returns each method's µs a step and its ratio to LoRA's of the same round (p20, p50, p80), or why none."""
    tiny = options.tiny
    base = llama(tiny, 4 if options.mode == "device" else 1, 1024, options.device)
    n_tokens, steps = (16, 1) if tiny else (4096, STEPS)
    ids = torch.randint(1024, (1, n_tokens), device=options.device)

    def build(adapter, methods=(), own_weights: bool = False) -> Provider:
        model = copied(base, own_weights)
        lf.inject_(model, adapter)
        optimizer = lf.optim.LoRAAdamW(model, lr=1e-5, methods=methods)
        if options.mode == "stub":
            return Provider(lambda: launched(model, optimizer, n_tokens, False))
        return Training(model, ids, steps, optimizer).provider

    r = 4 if tiny else RANK
    plain = lf.LoRAConfig(r=r, alpha=2 * r)
    providers = {
        "LoRA": lambda: build(plain),
        "NB-LoRA": lambda: build(lf.NBLoRAConfig(r=r)),
        "ScaLoRA": lambda: build(
            plain, lf.methods.ScaLoRA(interval=INTERVAL), own_weights=True
        ),  # ScaLoRA changes them
    }
    if options.mode == "stub":
        return {name: once(provider()) for name, provider in providers.items()}
    ready, figures = {}, {}
    for name, provider in providers.items():
        try:
            ready[name] = options.surviving(name, provider)()
        except Unavailable as reason:
            figures[name] = {"unavailable": str(reason)}
    unavailable = {f"ours, {name}": values["unavailable"] for name, values in figures.items()}
    if not ready:
        return judged([], unavailable)
    rounds = timed(ready, options.device, options.seconds / 3 if options.mode == "device" else 0.0, simply)
    for name in ready:
        times = rounds.times(name, "forward")
        figures[name] = {
            "microseconds a step": [t / steps for t in Spread.of(times).percentiles],
            "host": statistics.median(rounds.host_times(name, "forward")) / steps,
        }
        if "LoRA" in ready:
            lora_times = rounds.times("LoRA", "forward")
            ratios = [time / lora for time, lora in zip(times, lora_times, strict=True)]
            figures[name]["over LoRA"] = Spread.of(ratios).percentiles
    return figures | judged([], unavailable)


# ---- Stage 2: the whole model


def whole(options: Options) -> Jobs:
    """Measures tokens a second and peak memory of training steps in Llama-3-8B's shapes, with PEFT and with ours."""
    return [(WHOLE, lambda: of_engines(options))]


def engines(options: Options, base: torch.nn.Module) -> dict[str, Callable[[], tuple[torch.nn.Module, object]]]:
    """Returns for each engine a function that builds a model with adapters over the base weights, and an optimizer."""
    r = 4 if options.tiny else RANK

    def peft():
        try:
            from peft import LoraConfig, get_peft_model
        except ImportError as error:
            raise Unavailable(f"peft cannot be imported: {error}") from error
        config = LoraConfig(r=r, lora_alpha=2 * r, target_modules="all-linear")
        model = get_peft_model(copied(base), config)
        trained = [p for p in model.parameters() if p.requires_grad]
        return model, torch.optim.AdamW(trained, lr=1e-5, weight_decay=0.0, fused=True)

    def ours(adapter, methods=()):
        model = copied(base)
        lf.inject_(model, adapter)
        return model, lf.optim.LoRAAdamW(model, lr=1e-5, methods=methods)

    plain, methods = lf.LoRAConfig(r=r, alpha=2 * r), lf.methods
    first = {"PEFT": peft} if options.mode != "stub" else {}  # PEFT launches no kernel of ours
    return first | {
        "ours": lambda: ours(plain),
        "ours, iLoRA": lambda: ours(plain, methods.ILoRA(lam=0.1)),
        "ours, πLoRA": lambda: ours(plain, methods.PiLoRA()),
        "ours, NB-LoRA": lambda: ours(lf.NBLoRAConfig(r=r)),
        # ScaLoRA changes the shared weights, which are random anyway
        "ours, ScaLoRA": lambda: ours(plain, methods.ScaLoRA(interval=INTERVAL)),
    }


def of_engines(options: Options) -> dict:
    """Times interleaved steps under bfloat16 autocast, as Trainer runs them.

    The figures are written after every round, so that a section that is cut short keeps them.
    """
    tiny = options.tiny
    blocks, vocabulary = (32, 128_256) if options.mode == "device" else (2, 128)
    base = llama(tiny, blocks, vocabulary, options.device)
    shape = (1, 16) if tiny else (BATCH, SEQUENCE)
    ids = torch.randint(128, shape, device=options.device)
    providers, figures, start = {}, {}, time.monotonic()
    weights = allocated(options.device)
    for name, build in engines(options, base).items():

        def provider(build=build) -> Provider:
            model, optimizer = build()
            if options.mode == "stub":
                return Provider(lambda: launched(model, optimizer, ids.numel(), True))
            checkpoint_(model, figures.get(CHECKPOINTED_FIGURE, 0))
            return Training(model, ids, 1, optimizer, autocast=True).provider

        providers[name] = provider
    if options.mode == "stub":
        return {name: once(provider()) for name, provider in providers.items()}
    if (one_in := checkpointing_that_fits(providers, figures, options)) is None:
        return {"ok": None, "error": "this GPU has not enough memory, even with every block checkpointed"}
    figures[CHECKPOINTED_FIGURE], ready = one_in, {}
    for name, provider in providers.items():
        others = allocated(options.device) - weights
        try:
            built = options.surviving(name, provider)()
            most = (peak(built, options.device) - others) / 2**30
            figures[name] = {"peak GiB": most, "beside the weights GiB": most - weights / 2**30}
            ready[name] = built
        except Unavailable as reason:
            figures[name] = {"unavailable": str(reason)}
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            figures[name] = {"unavailable": describe(error)}
    engines_lost = {name: figures[name]["unavailable"] for name in providers if name not in ready}
    rounds, longest = Rounds(ready, options.device), 0.0
    for _ in range((ROUNDS if options.mode == "device" else 1) * bool(ready)):
        before = time.monotonic()
        if before + 1.3 * longest - start > options.seconds - MARGIN and rounds.turn:
            break
        rounds.run()
        longest = max(longest, time.monotonic() - before)
        for name in ready:
            times = rounds.times(name, "forward")
            # the mean, not the median, since ScaLoRA merges in one of ten steps
            figures[name] |= {"seconds a step": statistics.mean(times) / 1e6, "rounds": len(times)}
            figures[name]["tokens a second"] = ids.numel() / figures[name]["seconds a step"]
            figures[name]["host seconds"] = statistics.median(rounds.host_times(name, "forward")) / 1e6
        options.figures.add("whole", WHOLE, figures)
    return figures | judged([], engines_lost)


def checkpoint_(model: torch.nn.Module, one_in: int) -> None:
    """Turns on activation checkpointing in one of every ``one_in`` blocks; 0 means in none."""
    if one_in:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        for i, block in enumerate(block for block in model.modules() if hasattr(block, "gradient_checkpointing")):
            block.gradient_checkpointing = i % one_in == 0


def checkpointing_that_fits(providers: dict, figures: dict, options: Options) -> int | None:
    """Returns the first entry of ``CHECKPOINTED`` with which the first engine fits in memory, or None.

    All engines use the same entry.
    """
    name = next(iter(providers))
    for one_in in CHECKPOINTED:
        figures[CHECKPOINTED_FIGURE] = one_in
        try:
            if has_room(providers[name](), options.device):
                return one_in
        except Unavailable:
            return one_in
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        finally:
            gc.collect()
            if options.device.type == "cuda":
                torch.cuda.empty_cache()
    return None


def has_room(provider: Provider, device: torch.device) -> bool:
    """Runs once and returns whether the other engines' adapters would fit in memory beside it."""
    most = peak(provider, device)
    return device.type != "cuda" or most + SPARE <= torch.cuda.get_device_properties(device).total_memory


def is_out_of_memory(error: RuntimeError) -> bool:
    """Returns whether torch, cuBLAS or the driver ran out of memory."""
    return any(words in str(error) for words in ("out of memory", "ALLOC_FAILED"))


def allocated(device: torch.device) -> int:
    """Returns the bytes that are allocated now; 0 on a CPU."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def peak(provider: Provider, device: torch.device) -> int:
    """Runs once and returns the most bytes that were allocated at once, all engines counted; 0 on a CPU."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    once(provider)
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
