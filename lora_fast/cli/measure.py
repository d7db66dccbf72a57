"""What a run costs: seconds of a step, bytes kept for backward, memory of the device or the process."""

from __future__ import annotations

import platform
import statistics
import time
from dataclasses import asdict, dataclass, field
from importlib import metadata

import torch


@dataclass
class Record:
    """Everything that is measured in one engine's run; saved with each checkpoint, so a resumed run has all of it."""

    engine: str
    losses: list[float] = field(default_factory=list)  # of each step, before its update
    seconds: list[float] = field(default_factory=list)  # of each step: forward, backward, clipping, update
    memory: list[int] = field(default_factory=list)  # bytes: see memory_kind
    memory_kind: str = ""
    held_out: list[tuple[int, float]] = field(default_factory=list)  # (steps done, loss)
    saved_bytes: int = 0  # kept for backward by one micro-batch, parameters and buffers not counted
    trained_parameters: int = 0
    tokens_per_step: int = 0
    layers: str = ""  # the report of fuse_
    sample_before: str = ""
    sample_after: str = ""

    def as_dict(self) -> dict[str, object]:
        return asdict(self)

    def step_time(self) -> dict[str, float]:
        """Median and the 20th and 80th percentile, in seconds."""
        fifths = statistics.quantiles(self.seconds, n=5, method="inclusive") if len(self.seconds) > 1 else None
        low, high = (fifths[0], fifths[3]) if fifths else (self.seconds[0], self.seconds[0])
        return {"median": statistics.median(self.seconds), "p20": low, "p80": high}


class Stopwatch:
    """Times one training step, and takes the memory figure that its device offers.

    On CUDA the host waits for the device before both readings; memory is the allocator's peak within the step. On a CPU
    memory is the resident size of the whole process after the step.
    """

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self.memory_kind = "peak allocated on the GPU within the step" if self._cuda else "process size after the step"

    def start(self) -> None:
        if self._cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        self._started = time.perf_counter()

    def stop(self) -> tuple[float, int]:
        if self._cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - self._started
        return seconds, torch.cuda.max_memory_allocated() if self._cuda else _process_bytes()


def bytes_saved_for_backward(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> int:
    """Bytes of all distinct storages that one forward pass keeps for backward, the model's own tensors not counted.

    Deterministic, unlike a process's memory. Leaves the random state as it was.
    """
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def count(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    device = next(model.parameters()).device
    with torch.random.fork_rng(), torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        loss = model(**{name: tensor.to(device) for name, tensor in batch.items()}).loss  # keeps the graph alive
    del loss
    return sum(kept.values())


def environment() -> dict[str, object]:
    """Where the figures come from."""
    packages = ("lora-fast", "torch", "triton", "transformers", "peft", "accelerate")
    threads = torch.get_num_threads()
    on_cpu = f"CPU, {threads} thread{'s' * (threads > 1)}"
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else on_cpu,
        "machine": platform.machine(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in packages},
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _process_bytes() -> int:
    import psutil

    return psutil.Process().memory_info().rss
