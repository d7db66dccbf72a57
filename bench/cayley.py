"""NB-LoRA's cost on SmolLM2-135M: the Cayley transform of its 210 pairs, and a training step over plain LoRA's.

    python bench/cayley.py                 # about two minutes on a CPU
    python bench/cayley.py --only transform

The transform with its trained scales (nuclear norm), forward and backward, is compared with the paper's formula under
autograd, one layer after the other, and batched over layers of one shape. The two sides of a comparison take turns (AB,
BA, …), and the figure is the median of the ratios. Run the tests first: a figure means nothing else.
"""

import argparse
import copy
import json
import statistics
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from train_step import batches, step_seconds

import lora_fast as lf
from lora_fast import cayley
from lora_fast.cli import models

LAYERS = 30
# (d_out, d_in) of q, o; k, v; gate, up; down
SHAPES = [(576, 576)] * 2 + [(192, 576)] * 2 + [(1536, 576)] * 2 + [(576, 1536)]


class Transform:
    """Forward and backward of one implementation over all pairs; ``step`` is what is timed."""

    def __init__(self, make, rank: int, device: str):
        generator = torch.Generator().manual_seed(0)
        draw = lambda *shape: torch.randn(*shape, generator=generator).to(device)
        shapes = SHAPES * LAYERS
        self.make = make
        self.free_a = [nn.Parameter(draw(rank, d_in) / d_in**0.5) for _, d_in in shapes]
        self.free_b = [nn.Parameter(draw(d_out, rank) / d_out**0.5) for d_out, _ in shapes]
        self.free_scale = [nn.Parameter(draw(rank)) for _ in shapes]
        self.free = self.free_a, self.free_b, self.free_scale
        self.grads = [draw(*x.shape) for x in self.free_a + self.free_b]

    def step(self) -> None:
        for x in (x for xs in self.free for x in xs):
            x.grad = None
        a, b = self.make(*self.free)
        torch.autograd.backward([*a, *b], self.grads)


def ours(free_a, free_b, free_scale):
    n, rank = len(free_a), free_a[0].shape[0]
    return cayley.factors(cayley.Free(free_a, free_b, free_scale, [float(rank)] * n, [1.0] * n))


def formula(free_a, free_b, free_scale):
    """The paper's, of one pair, or of stacked pairs of one shape: a, and b with 2 sv in its columns."""
    r = free_a.shape[-2]
    a1, a2 = free_a[..., :r], free_a[..., r:]
    eye = torch.eye(r, device=free_a.device)
    inverse = torch.linalg.inv(eye + a1.mT - a1 + a2 @ a2.mT + free_b.mT @ free_b)
    scale = 2 * r * torch.softmax(free_scale / r**0.5, -1)
    return torch.cat([2 * inverse.mT - eye, -2 * inverse.mT @ a2], -1), -2 * free_b @ inverse * scale[..., None, :]


def looped(*free):
    return zip(*(formula(*pair) for pair in zip(*free, strict=True)), strict=True)


def batched(free_a, free_b, free_scale):
    places: dict[tuple, list[int]] = {}
    for i, (a, b) in enumerate(zip(free_a, free_b, strict=True)):
        places.setdefault((a.shape, b.shape), []).append(i)
    made_a, made_b = {}, {}
    for indices in places.values():
        a, b = formula(*(torch.stack([xs[i] for i in indices]) for xs in (free_a, free_b, free_scale)))
        made_a |= dict(zip(indices, a.unbind(), strict=True))
        made_b |= dict(zip(indices, b.unbind(), strict=True))
    return ([made[i] for i in range(len(free_a))] for made in (made_a, made_b))


class Training:
    """Steps of one model, forward, backward and AdamW."""

    def __init__(self, model: nn.Module, feed):
        self.model, self.feed = model, feed
        self.optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-4, fused=True)

    def step(self) -> None:
        step_seconds(self.model, self.optimizer, next(self.feed))


def trainings(rank: int, seq_len: int, batch: int, device: torch.device) -> tuple[Training, Training]:
    """NB-LoRA and plain LoRA over the same frozen weights and the same text."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    plain = models.load_model(models.cached(models.PACKAGED, ""), dtype).to(device).train()
    bounded = copy.deepcopy(plain, {id(p): p for p in plain.parameters()})
    lf.inject_(plain, lf.LoRAConfig(r=rank, alpha=rank))
    lf.inject_(bounded, lf.NBLoRAConfig(r=rank))
    return tuple(Training(model, batches(seq_len, batch, device)) for model in (bounded, plain))


def compare(mine, other, repeats: int, device: str) -> dict:
    """Seconds of a step of both, taking turns; the first turn warms up."""
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    taken, sides = {"ours": [], "theirs": []}, {"ours": mine, "theirs": other}
    for turn in range(repeats + 1):
        for side in ("ours", "theirs") if turn % 2 else ("theirs", "ours"):
            synchronize()
            start = time.perf_counter()
            sides[side].step()
            synchronize()
            if turn:
                taken[side].append(time.perf_counter() - start)
    return taken


def bytes_kept(rank: int, device: str) -> tuple[int, int]:
    """What a node keeps besides its parameters, and the bytes of a and b."""
    a, b = ours(*Transform(ours, rank, device).free)
    size = lambda tensors: sum(x.numel() * x.element_size() for x in tensors)
    return size(a[0].grad_fn.inverses), size([*a, *b])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=20, help="counted turns of the transform (default %(default)s)")
    parser.add_argument("--pairs", type=int, default=8, help="counted pairs of training steps (default %(default)s)")
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--only", choices=["transform", "training"], help="one of the two")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    models.quieten()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    place = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    title = f"{len(SHAPES) * LAYERS} pairs, r={options.rank}, {place}, torch {torch.__version__}"
    table = Table(title=title)
    for column in ("figure", "ours ms", "other ms", "ratio (p20–p80)", "goal"):
        table.add_column(column, justify="left" if column == "figure" else "right")
    results = []

    def row(name: str, goal: str, mine, other, ours_on_top: bool, repeats: int) -> None:
        taken = compare(mine, other, repeats, device.type)
        both = zip(taken["ours"], taken["theirs"], strict=True)
        ratios = [mine / other if ours_on_top else other / mine for mine, other in both]
        cuts = statistics.quantiles(ratios, n=5)
        median, mine, other = (statistics.median(x) for x in (ratios, taken["ours"], taken["theirs"]))
        spread = f"{median:.3f} ({cuts[0]:.3f}–{cuts[3]:.3f})"
        table.add_row(name, f"{mine * 1e3:.1f}", f"{other * 1e3:.1f}", spread, goal)
        results.append({"figure": name, "goal": goal, "ratios": ratios, "seconds": taken})

    if options.only != "training":
        make = lambda function: Transform(function, options.rank, device.type)
        for way, goal, other in (("layer by layer", "≥ 3", looped), ("batched by shape", "", batched)):
            name = f"formula under autograd, {way} / ours"
            row(name, goal, make(ours), make(other), False, options.repeats)
    if options.only != "transform":
        bounded, plain = trainings(options.rank, options.seq_len, options.batch, device)
        name = f"training step, {options.batch}×{options.seq_len} tokens: NB-LoRA / LoRA"
        row(name, "≤ 1.05", bounded, plain, True, options.pairs)
    Console(width=120).print(table)
    inverses, factors = bytes_kept(options.rank, device.type)
    print(f"kept for backward: {inverses / 1024:.0f} KiB of Wi; a and b themselves: {factors / 2**20:.1f} MiB")
    if options.json:
        conditions = {"rank": options.rank, "device": place, "torch": torch.__version__}
        kept = {"inverses": inverses, "factors": factors}
        options.json.write_text(json.dumps({**conditions, "results": results, "bytes_kept": kept}, indent=1))


if __name__ == "__main__":
    main()
