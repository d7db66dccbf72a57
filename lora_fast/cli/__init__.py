"""The command ``lora-fast``. Each sub-command has its own file or folder, which imports transformers, peft and Triton
only when the command runs, so that help is quick."""

from __future__ import annotations

from typing import Annotated

from .. import __version__
from ..checks import MissingPackageError

try:
    import rich  # noqa: F401
    import typer
except ImportError as error:
    fix = "pip install typer rich matplotlib jinja2 psutil (in the repository: pip install '.[cli]')"
    raise MissingPackageError(f"the command lora-fast needs more packages: {fix}") from error

from .bench import bench
from .doctor.command import doctor
from .finetune.command import EPILOG as FINETUNE_EPILOG
from .finetune.command import finetune
from .inspect import EPILOG as INSPECT_EPILOG
from .inspect import inspect
from .profile.command import profile
from .reproduce.command import EPILOG as REPRODUCE_EPILOG
from .reproduce.command import reproduce
from .tune.command import tune

app = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown", add_completion=False)


def _show_version(requested: bool) -> None:
    if requested:
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
    and its pair as one operation, which computes the same function and keeps less memory for backward.

    **Examples**

    - `lora-fast finetune`

        trains a small model on a text; both are installed as packages. Takes about two minutes, without a network

    - `lora-fast finetune --model Qwen/Qwen3-0.6B --data notes.txt`

        trains your own model on your own text

    - `lora-fast profile --no-compile`

        measures whether fusing helps a model on this machine

    - `lora-fast doctor`

        prints versions and devices, tries every part, and explains how to repair what does not work

    - `lora-fast reproduce --quick`

        repeats experiments of the methods' papers, and shows the results beside theirs

    - `lora-fast inspect --arch 90 --rank 16`

        compiles the kernels and prints their registers, spills, tensor cores and traffic, without a GPU

    - `lora-fast bench --quick`

        times every op beside eager torch, torch.compile and PEFT; needs the repository

    - `lora-fast finetune --help`

        explains every option of a command
    """


app.command(epilog=FINETUNE_EPILOG)(finetune)
app.command(epilog=INSPECT_EPILOG)(inspect)
app.command(epilog=REPRODUCE_EPILOG)(reproduce)
app.command()(profile)
app.command()(tune)
app.command()(bench)
app.command()(doctor)


def main() -> None:
    """Runs the command line."""
    app()
