"""The command lora-fast: one file per sub-command. Heavy imports wait until a command runs, so that help is quick."""

from __future__ import annotations

from typing import Annotated

from .. import __version__
from ..checks import MissingPackageError

try:
    import rich  # noqa: F401
    import typer
except ImportError as error:
    fix = "pip install typer rich matplotlib jinja2 psutil (in the repository: pip install '.[cli]')"
    raise MissingPackageError(f"lora-fast, the command line, needs more packages: {fix}") from error

from .bench import bench
from .doctor.command import doctor
from .finetune.command import EPILOG, finetune
from .inspect import EPILOG as INSPECTIONS
from .inspect import inspect
from .profile.command import profile
from .reproduce.command import EPILOG as REPRODUCE_EPILOG
from .reproduce.command import reproduce
from .tune.command import tune

app = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown", add_completion=False)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"lora-fast {__version__}")
        raise typer.Exit


@app.callback()
def lora_fast(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Fine-tune language models with LoRA, on fused layers.

    LoRA freezes a model and trains a small pair of matrices beside each of its linear layers. This program runs a layer
    and its pair as one operation: the same numbers, less time and memory.

    **Examples**

    - `lora-fast finetune`

        a first run, with a small model and a text that come as packages: about three minutes, no network

    - `lora-fast finetune --model Qwen/Qwen3-0.6B --data notes.txt`

        your own model and text

    - `lora-fast profile --no-compile`

        what fusing brings for a model on this machine, or that it brings nothing

    - `lora-fast doctor`

        versions, devices, what works and what to do about what does not

    - `lora-fast reproduce --quick`

        what the methods' papers show, run again and put beside their numbers

    - `lora-fast inspect --arch 90 --rank 16`

        what the kernels compile to: registers, spills, tensor cores, traffic; no GPU needed

    - `lora-fast bench --quick`

        every op beside eager torch, torch.compile and PEFT; needs the repository

    - `lora-fast finetune --help`

        every option of a command
    """


app.command(epilog=EPILOG)(finetune)
app.command(epilog=INSPECTIONS)(inspect)
app.command(epilog=REPRODUCE_EPILOG)(reproduce)
app.command()(profile)
app.command()(tune)
app.command()(bench)
app.command()(doctor)


def main() -> None:
    """Entry point of ``lora-fast``."""
    app()
