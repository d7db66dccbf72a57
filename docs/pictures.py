"""The pictures of the pages in this folder: ``python docs/pictures.py`` draws them again, as SVG beside this file.

Text becomes outlines and nothing depends on the time, so one version of matplotlib draws the same bytes every time.
They have a background of their own: the pages are read on light and on dark.
"""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

INK, FAINT, PAPER = "#1d2733", "#5b6673", "#fbfcfe"
KERNEL, TENSOR, SAVED = ("#dcebfd", "#2f7de1"), ("#ffffff", "#7f8896"), ("#fdeedd", "#e0802f")  # fill, edge
STYLE = {"svg.fonttype": "path", "svg.hashsalt": "lora_fast", "font.family": "DejaVu Sans", "font.size": 10}


class Canvas:
    """A figure 10 inches wide, in units of a hundredth of its width; y goes up."""

    def __init__(self, height: float):
        self.figure = plt.figure(figsize=(10, height / 10), facecolor=PAPER)
        self.axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set(xlim=(0, 100), ylim=(0, height))
        self.axes.axis("off")

    def box(self, x: float, y: float, width: float, height: float, lines: str, colours=KERNEL, dashed=False) -> None:
        """A rounded box with its lower left corner at (x, y); the first of its lines is bold."""
        fill, edge = colours
        style = {"facecolor": fill, "edgecolor": edge, "linewidth": 1.3, "linestyle": "--" if dashed else "-"}
        shape = "round,pad=0,rounding_size=0.9"
        self.axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=shape, zorder=2, **style))
        rows = lines.split("\n")
        for i, row in enumerate(rows):
            level = y + height / 2 + (len(rows) / 2 - 0.5 - i) * 2.4
            self.text(x + width / 2, level, row, ha="center", weight="bold" if i == 0 else "normal")

    def text(self, x: float, y: float, text: str, colour: str = INK, **style) -> None:
        self.axes.text(x, y, text, color=colour, va="center", zorder=4, **style)

    def arrow(self, *points: tuple[float, float], colour: str = FAINT) -> None:
        """Straight lines through the points, with a head at the last."""
        for start, end in pairwise(points[:-1]):
            self.axes.plot(*zip(start, end, strict=True), color=colour, linewidth=1.4, zorder=1, solid_capstyle="round")
        head = {"arrowstyle": "-|>", "mutation_scale": 12, "shrinkA": 0, "shrinkB": 0}
        self.axes.add_patch(FancyArrowPatch(*points[-2:], color=colour, linewidth=1.4, zorder=3, **head))


def layer() -> Canvas:
    """Forward and backward of one layer: what each kernel reads and writes, and what is kept in between."""
    c = Canvas(69)
    c.text(2, 66, "Forward", weight="bold", size=12)
    c.box(2, 50, 11, 8, "x\n(tokens, d_in)", SAVED)
    c.box(21, 49, 21, 10, "project\nS = (k∘x) aᵀ\nreads x once")
    c.box(50, 50, 10, 8, "S\n(tokens, r)", SAVED)
    c.box(67, 49, 22, 10, "linear\ny = x Wᵀ + s S bᵀ + bias\nthe GEMM")
    c.box(95, 51, 4, 6, "y", TENSOR)
    c.arrow((13, 54), (21, 54))
    c.arrow((42, 54), (50, 54))
    c.arrow((60, 54), (67, 54))
    c.arrow((89, 54), (95, 54))
    c.arrow((7.5, 58), (7.5, 62.5), (78, 62.5), (78, 59))
    c.arrow((31.5, 45.5), (31.5, 49))
    c.text(33, 46.2, "seed → mask k", FAINT, size=9)
    kept = "kept for backward: x and S. Not kept: the mask k, dropout(x), a or b in another dtype"
    c.box(2, 36.5, 96, 5.5, kept, SAVED)
    c.arrow((5, 50), (5, 42), colour=SAVED[1])
    c.arrow((55, 50), (55, 42), colour=SAVED[1])

    c.text(2, 33, "Backward", weight="bold", size=12)
    c.box(93, 17, 5, 6, "dy", TENSOR)
    c.box(64, 14, 22, 12, "grad_s_b\ndS = s dy b\ndb = s dyᵀ S\nreads dy once")
    c.box(50, 16, 7.5, 8, "dS", TENSOR)
    c.box(20, 19.5, 22, 10, "grad_a\nda = dSᵀ (k∘x)\nreads x once")
    c.box(20, 3.5, 22, 10, "grad_x\ndx = dy W + k∘(dS a)\nthe same GEMM")
    c.box(4, 21.5, 6, 6, "da", TENSOR)
    c.box(4, 5.5, 6, 6, "dx", TENSOR)
    c.box(72, 4, 6, 5.5, "db", TENSOR)
    c.arrow((93, 20), (86, 20))
    c.arrow((64, 20), (57.5, 20))
    c.arrow((75, 14), (75, 9.5))
    c.arrow((50, 21.5), (46, 21.5), (46, 24.5), (42, 24.5))
    c.arrow((50, 18.5), (46, 18.5), (46, 10), (42, 10))
    c.arrow((95.5, 17), (95.5, 1.7), (48.5, 1.7), (48.5, 6.5), (42, 6.5))
    c.arrow((20, 24.5), (10, 24.5))
    c.arrow((20, 8.5), (10, 8.5))
    c.arrow((31, 36.5), (31, 29.5), colour=SAVED[1])
    c.text(32, 33, "x, and k from the seed", FAINT, size=9)
    c.arrow((75, 36.5), (75, 26), colour=SAVED[1])
    c.text(76, 31.5, "S", FAINT, size=9)
    c.text(20, 15.3, "dx only where x needs a gradient", FAINT, size=9)
    c.text(20, 1.7, "k from the seed here, too", FAINT, size=9)
    return c


def strategies() -> Canvas:
    """The two ways to compute y = x Wᵀ + s S bᵀ + bias that are chosen by estimate."""
    c = Canvas(37)
    c.text(2, 34, "fused", weight="bold", size=12)
    c.text(10, 34, "one Triton kernel, one pass over the result", FAINT)
    c.box(2, 21.5, 27, 9, "accumulator\n= s S bᵀ + bias\nfloat32, in registers")
    c.box(36, 21.5, 27, 9, "for each block of d_in\naccumulator += x · Wᵀ\ntensor cores")
    c.box(70, 21.5, 27, 9, "store y\nrounded once\none write of y")
    c.text(2, 16, "cublas", weight="bold", size=12)
    c.text(10, 16, "cuBLAS, then a kernel that adds the adapter's part", FAINT)
    c.box(2, 3.5, 27, 9, "cuBLAS GEMM\nx Wᵀ + bias\none write, rounded")
    c.box(36, 3.5, 27, 9, "update kernel\nreads that, adds s S bᵀ\nfloat32, in registers")
    c.box(70, 3.5, 27, 9, "store y\nrounded again\na second write")
    for y in (26, 8):
        c.arrow((29, y), (36, y))
        c.arrow((63, y), (70, y))
    return c


def step() -> Canvas:
    """An optimizer step for all pairs: tall passes and the r×r algebra between them."""
    c = Canvas(55)
    c.text(2, 52, "One step, all adapter pairs of one rank", weight="bold", size=12)
    c.text(2, 48.8, "solid: always.  dashed: for the methods named.  Launches do not grow with the layers.", FAINT)
    x, width, height = 31, 34, 8
    top = [37, 26.5, 16, 5.5]
    boxes = [
        "pass 1: Grams\na aᵀ, bᵀb (and three with gradients)\nreads a, b (da, db)",
        "middle: r×r algebra\nsolve, inverse, scales\na program per pair or matrix",
        "pass 2: change g, then AdamW\nreads p, g, m, v, writes p, m, v\ncan leave the new p's Gram",
        "after: middle, transform\na ← M a,  b ← b M\nreads and writes p",
    ]
    for y, lines in zip(top, boxes, strict=True):
        c.box(x, y, width, height, lines, dashed=y != top[2])
    for upper, lower in pairwise(top):
        c.arrow((x + width / 2, upper), (x + width / 2, lower + height))
    notes = [
        "ScaleReg, ScaledAdamW, PiLoRA, RefLoRA\nScaLoRA: where it scales",
        "ScaleReg: 2 numbers a pair\nScaledAdamW, PiLoRA: 2 inverses\nScaLoRA: α, β, and the merge into W",
        "every method but LoRARITE, LoRAMuon;\nnothing else: plain AdamW, LoRAPlus",
        "ILoRA, PiLoRA: pull to balance\nBaLoRA: same product, balanced",
    ]
    for y, note in zip(top, notes, strict=True):
        c.text(68, y + height / 2, note, FAINT, linespacing=1.35)
    c.box(3, 24, 19, 13, "one pair\na (r, d_in)\nb (d_out, r)\ngradients da, db\nmoments m, v", TENSOR)
    c.arrow((12.5, 37), (12.5, 41), (31, 41))
    c.arrow((12.5, 24), (12.5, 20), (31, 20))
    c.text(3, 2.2, "r×r matrices are float32", FAINT, size=9)
    return c


def batches() -> Canvas:
    """Where factors lie: torch stacks and Triton groups."""
    c = Canvas(44)
    c.text(2, 41, "torch: Stack", weight="bold", size=12)
    c.text(2, 37.8, "pairs of equal shape, in one tensor", FAINT)
    for i in range(3):
        c.box(4, 27.5 - i * 6, 17, 5, f"a of layer {i}", TENSOR)
        c.arrow((21, 30 - i * 6), (27, 30 - i * 6))
    c.box(27, 14.5, 16, 19, "(L, r, d_in)\n\na parameter's data\nis a slice of it", SAVED)
    c.box(4, 3, 39, 6.5, "batched torch\nmatmul, Cholesky, AdamW over stacks")
    c.arrow((35, 14.5), (35, 9.5))
    c.axes.plot((49, 49), (2, 42), color="#c8ced6", linewidth=1)
    c.text(54, 41, "Triton: Group", weight="bold", size=12)
    c.text(54, 37.8, "all pairs of one rank, any sizes, where they lie", FAINT)
    for i, size in enumerate(("a (r, 576)", "b (1536, r)", "b (192, r)")):
        c.box(80, 27.5 - i * 6, 17, 5, size, TENSOR)
        c.arrow((74, 30 - i * 6), (80, 30 - i * 6))
    row = "table, int64\n\na row per factor:\naddresses p g m v,\nsize, rank, side,\nfirst program"
    c.box(54, 14.5, 20, 19, row, SAVED)
    c.box(54, 3, 43, 6.5, "one launch\neach program looks up its factor and chunk")
    c.arrow((64, 14.5), (64, 9.5))
    return c


PICTURES = {"layer": layer, "strategies": strategies, "step": step, "batches": batches}


def draw(folder: Path) -> list[Path]:
    """Write all pictures into the folder; their paths."""
    paths = []
    for name, picture in PICTURES.items():
        with plt.rc_context(STYLE):
            figure = picture().figure
            paths.append(folder / f"{name}.svg")
            figure.savefig(paths[-1], facecolor=PAPER, metadata={"Date": None})
            plt.close(figure)
    return paths


if __name__ == "__main__":
    for path in draw(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent):
        print(path)
