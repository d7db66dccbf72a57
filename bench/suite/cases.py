"""The cases of the suite: the linear layers of real models, and how many of them are measured on which machine.

A case of a layer's op has one (d_in, d_out). A case of a step's op has those of all adapter pairs of a model.
"""

from dataclasses import dataclass
from typing import NamedTuple

Shape = tuple[int, int]  # d_in, d_out


class Model(NamedTuple):
    """A model's adapted layers. ``linears``: name → (d_in, d_out) in one block; the output layer is not adapted."""

    blocks: int
    linears: dict[str, Shape]

    @property
    def pairs(self) -> tuple[Shape, ...]:
        return tuple(self.linears.values()) * self.blocks


def _model(blocks: int, hidden: int, keys: int, inner: int) -> Model:
    linears = dict.fromkeys(("q", "o"), (hidden, hidden)) | dict.fromkeys(("k", "v"), (hidden, keys))
    linears |= dict.fromkeys(("gate", "up"), (hidden, inner)) | {"down": (inner, hidden)}
    return Model(blocks, linears)


MODELS = {
    "SmolLM2-135M": _model(30, 576, 192, 1536),
    "Llama-3-8B": _model(32, 4096, 1024, 14336),
    "Mistral-7B": _model(32, 4096, 1024, 14336),
    "Qwen2.5-7B": _model(28, 3584, 512, 18944),
}
RANKS = (8, 16, 32, 64, 128)


def distinct(models: tuple[str, ...]) -> dict[Shape, str]:
    """Returns every distinct shape of a linear layer in these models, with the names of the layers that have it."""
    users: dict[Shape, dict[str, list[str]]] = {}
    for model in models:
        for name, shape in MODELS[model].linears.items():
            users.setdefault(shape, {}).setdefault(model, []).append(name)
    return {
        shape: "; ".join(f"{model} {', '.join(names)}" for model, names in layers.items())
        for shape, layers in users.items()
    }


@dataclass(frozen=True)
class Case:
    """A row of the suite before it is measured.

    Attributes:
        op: name of the op's file. label: the model or layers that have these shapes.
        pairs: (d_in, d_out) of each adapter pair. dtype: of activations and frozen weights.
        variant: what else distinguishes the cases of an op, such as a method.
    """

    op: str
    label: str
    pairs: tuple[Shape, ...]
    r: int
    n_tokens: int = 0
    dtype: str = "float32"
    dropout: float = 0.0
    variant: str = ""

    @property
    def shape(self) -> Shape:
        """The (d_in, d_out) of the only pair."""
        (shape,) = self.pairs
        return shape

    @property
    def name(self) -> str:
        size = "{}→{}".format(*self.pairs[0]) if len(self.pairs) == 1 else f"{self.label}, {len(self.pairs)} pairs"
        tokens = {0: "", 1: "1 token"}.get(self.n_tokens, f"{self.n_tokens} tokens")
        words = [size, f"r={self.r}", self.variant, tokens]
        words += [f"dropout {self.dropout:g}" if self.dropout else "", self.dtype]
        return ", ".join(word for word in words if word)


def from_dict(given: dict) -> Case:
    """Restores a case from ``dataclasses.asdict`` after a round trip through JSON, which has no tuples."""
    return Case(**{**given, "pairs": tuple(tuple(shape) for shape in given["pairs"])})


@dataclass(frozen=True)
class Scale:
    """The extent of a run.

    Attributes:
        linears: shape → label. models: for the step's ops; only their first ``most_pairs`` pairs are used.
        operations: limit on the frozen GEMM's operations, which bounds the tokens together with ``n_tokens``.
        seconds: time for the timed rounds of a case. compiled: whether torch.compile is among the providers.
    """

    linears: dict[Shape, str]
    models: tuple[str, ...]
    ranks: tuple[int, ...]
    dtypes: tuple[str, ...]
    dropouts: tuple[float, ...]
    n_tokens: int
    seconds: float
    operations: float = float("inf")
    most_pairs: int | None = None
    compiled: bool = True

    def tokens(self, shape: Shape) -> int:
        return int(min(self.n_tokens, max(16, self.operations / (2 * shape[0] * shape[1]))))

    def layers(self, op: str, dropouts: tuple[float, ...] = (0.0,), dtypes: tuple[str, ...] = ()) -> list[Case]:
        """Returns a case for every linear × rank × dtype × dropout."""
        return [
            Case(op, label, (shape,), r, self.tokens(shape), dtype, dropout)
            for shape, label in self.linears.items()
            for r in self.ranks
            for dtype in dtypes or self.dtypes
            for dropout in dropouts
        ]

    def steps(self, op: str, variants: tuple[str, ...] = ("",)) -> list[Case]:
        """Returns a case for every model × rank × variant, with all pairs of the model and float32 adapters."""
        return [
            Case(op, model, MODELS[model].pairs[: self.most_pairs], r, variant=variant)
            for model in self.models
            for r in self.ranks
            for variant in variants
        ]


SMALL, LARGE = "SmolLM2-135M", "Llama-3-8B"
SCALES = {
    "gpu": Scale(distinct(tuple(MODELS)), (LARGE, "Qwen2.5-7B"), RANKS, ("bfloat16",), (0.0, 0.1), 8192, 0.3),
    "gpu-quick": Scale(distinct((LARGE,)), (LARGE,), (16,), ("bfloat16",), (0.0,), 8192, 0.1, compiled=False),
    "cpu": Scale(
        {**distinct((SMALL,)), (4096, 4096): distinct((LARGE,))[4096, 4096]},
        (SMALL,),
        (16,),
        ("float32",),
        (0.0, 0.1),
        512,
        1.0,
        operations=1e9,
    ),
    "cpu-quick": Scale(
        {(576, 576): f"{SMALL} q, o"}, (SMALL,), (16,), ("float32",), (0.0,), 256, 0.3, most_pairs=28, compiled=False
    ),
    "tiny": Scale({(48, 32): "tiny"}, (SMALL,), (4,), ("float32",), (0.0,), 16, 0.01, most_pairs=2, compiled=False),
}
