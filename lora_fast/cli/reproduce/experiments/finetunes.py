"""Trains SmolLM2-135M with the pipeline of ``lora-fast finetune``, for the experiments that share these runs."""

from __future__ import annotations

import shutil

from ...finetune import pipeline
from ...finetune.record import Record
from ...inputs.method_options import METHODS
from ...inputs.settings import Settings
from ...output.terminal import Display
from .session import Session

FOLDER = "smollm2"


class Quiet(Display):
    """A display that shows the progress bars of the runs and nothing else."""

    def note(self, text: str, style: str = "") -> None:
        pass


def train(session: Session, methods: list[str]) -> dict[str, Record]:
    """Returns the record of each method. Methods that this session has trained before are not trained again."""
    missing = [name for name in methods if name not in session.trained]
    if missing:
        folder = session.folder / f"{FOLDER}-{len(session.trained) + 1}"
        records = pipeline.run(settings(session, missing), folder, False, Quiet()).records
        session.trained.update(zip(missing, records, strict=True))
        for checkpoints in folder.glob("*/checkpoints"):  # they serve only to resume an interrupted job
            shutil.rmtree(checkpoints)
    return {name: session.trained[name] for name in methods}


def settings(session: Session, methods: list[str]) -> Settings:
    """Returns the settings of all these runs."""
    steps, seq_len = (5, 64) if session.quick else (16, 128)
    return Settings(
        method=tuple(methods), compare=len(methods) > 1, steps=steps, seq_len=seq_len, save_every=steps
    ).check()


def conditions(session: Session) -> str:
    """Describes the settings in words, for the notes of an experiment."""
    chosen = settings(session, list(METHODS))
    return (
        f"SmolLM2-135M on the King James text, float32, rank {chosen.rank} on all linear layers, {chosen.steps} steps "
        f"of {chosen.batch}×{chosen.seq_len} tokens, learning rate {chosen.lr:g} with linear decay, seed "
        f"{chosen.seed}; every method at its default options and this rate, not tuned individually."
    )
