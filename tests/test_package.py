"""How the package is put together: light to import, installed under one name, imports that run downwards only."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# A module may import from its own layer and from those after it.
LAYERS = [
    ["cli"],
    ["hf"],
    ["optim", "metrics"],
    ["batches", "methods"],
    ["stacks", "groups", "plain"],
    ["batch"],
    ["pairs"],
    ["checkpoint"],
    ["base_weights", "free_files"],
    ["adapter_files", "files"],
    ["surgery", "merging", "peft_linear", "configs", "layers", "report", "targets", "progress"],
    ["linear", "nb_linear", "sing_linear"],
    ["adapter_linear"],
    ["factors", "projection"],
    ["changed_base"],
    ["functional"],
    ["autograd", "grouped", "cayley"],
    ["step"],
    ["kernels", "reference", "reference_step", "reference_scalora", "reference_cayley", "backend"],
    ["checks"],
]
DEPTH = {name: depth for depth, names in enumerate(LAYERS) for name in names}


def run(code: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_is_light():
    heavy = ["triton", "transformers", "peft", "accelerate", "typer", "rich", "matplotlib", "jinja2"]
    loaded = run(
        "import torch, sys; before = set(sys.modules); import lora_fast;"
        f"print(*[m for m in {heavy} if m in set(sys.modules) - before])"
    )
    assert loaded == ""


def test_import_adds_few_modules():
    """Half a second over torch is the goal; modules are counted, since a timed test fails on a busy machine."""
    added = run("import torch, sys; n = len(sys.modules); import lora_fast; print(len(sys.modules) - n)")
    assert int(added) < 200


def test_no_module_is_called_kernels():
    assert run("import lora_fast.kernels.layer, sys; print('kernels' in sys.modules)") == "False"


def test_every_public_name_exists():
    missing = run("import lora_fast as lf; print(*[name for name in lf.__all__ if not hasattr(lf, name)])")
    assert missing == ""


def imported(path: Path) -> set[str]:
    """The modules of the project that a file of lora_fast/ imports, wherever in the file."""
    inside = path.parent.name in ("cli", "methods")
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level == (2 if inside else 1):
            found |= {node.module.split(".")[0]} if node.module else {name.name for name in node.names}
    return found


SOURCES = sorted([*(ROOT / "lora_fast").glob("*.py"), *(ROOT / "lora_fast" / "methods").glob("*.py")])


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_imports_run_downwards(path):
    if path.stem == "__init__":
        return
    layer = "methods" if path.parent.name == "methods" else path.stem
    for name in imported(path) & DEPTH.keys():
        assert DEPTH[layer] <= DEPTH[name], f"{path.stem} imports {name}"
    twins = {"reference", "reference_step", "reference_scalora", "reference_cayley"}
    if layer in twins:
        assert not imported(path)
    if layer not in ("functional", "autograd", "step", "cayley", "groups", "stacks"):
        assert not imported(path) & {"kernels", *twins}


@pytest.mark.parametrize("path", sorted((ROOT / "kernels").glob("*.py")), ids=lambda path: path.stem)
def test_kernels_import_torch_and_triton_only(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import) or (isinstance(node, ast.ImportFrom) and node.level == 0):
            names = [node.module] if isinstance(node, ast.ImportFrom) else [name.name for name in node.names]
            for name in names:
                root = name.split(".")[0]
                assert root in {"torch", "triton", "numpy"} or root in sys.stdlib_module_names, name


@pytest.mark.parametrize("command", ["", "finetune", "profile", "tune", "doctor"], ids=lambda name: name or "lora-fast")
def test_help_has_an_example(command):
    program = str(Path(sys.executable).with_name("lora-fast"))
    shown = subprocess.run([program, *command.split(), "--help"], capture_output=True, text=True)
    assert shown.returncode == 0 and f"lora-fast {command or 'finetune'}" in shown.stdout and "xample" in shown.stdout
