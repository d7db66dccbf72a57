"""How the package is put together: light to import, installed under one name, imports that run downwards only."""

import ast
import os
import runpy
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import setuptools
import torch
from packaging.requirements import Requirement
from packaging.version import Version
from pinned_versions import pinned

from lora_fast import platforms

ROOT = Path(__file__).resolve().parents[1]
# A folder or file of lora_fast/ may import from its own row and from those below it.
LAYERS = [
    ["cli"],
    ["hf"],
    ["optim", "metrics"],
    ["methods"],
    ["batches", "checkpoints"],
    ["surgery"],
    ["layers"],
    ["functional"],
    ["ops"],
    ["quantized"],
    ["backend", "measure"],
    ["platforms", "regions", "at_import"],
    ["checks"],
    ["kernels"],
]
SHARED = [("kernels", name) for name in ("atomic_file", "device", "grouping", "limits", "records")]  # need no Triton
DEPTH = {name: depth for depth, names in enumerate(LAYERS) for name in names}


def run(code: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_is_light():
    heavy = ["triton", "transformers", "peft", "accelerate", "typer", "rich", "matplotlib", "jinja2"]
    heavy += ["bitsandbytes", "torchao"]
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
    assert run("import lora_fast.kernels.linear, sys; print('kernels' in sys.modules)") == "False"


def test_every_public_name_exists():
    missing = run("import lora_fast as lf; print(*[name for name in lf.__all__ if not hasattr(lf, name)])")
    assert missing == ""


@pytest.fixture(scope="session")
def editable(tmp_path_factory) -> Path:
    """Returns a folder in which a copy of the checkout, called lora_fast, is installed editable."""
    clone = tmp_path_factory.mktemp("parent") / "lora_fast"
    shutil.copytree(ROOT / "lora_fast", clone / "lora_fast", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, clone)
    site = tmp_path_factory.mktemp("site")
    build = "import setuptools.build_meta as meta, sys; print(meta.build_editable(sys.argv[1]))"
    done = subprocess.run([sys.executable, "-c", build, str(site)], cwd=clone, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = site.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(site)
    return site


@pytest.mark.parametrize("place", ["parent", "clone"])
def test_editable_install_is_imported_from_every_folder(editable, place):
    """A clone may be called lora_fast, and Python takes such a folder for a namespace package before it asks import
    hooks. Without -S, this environment's own installation of lora_fast would be on the path."""
    (entry,) = [Path(line) for path in editable.glob("*.pth") for line in path.read_text().splitlines()]
    assert entry.name == "lora_fast" and entry.is_dir()
    code = (
        "import site, sys; sys.path.append(sys.argv[1]); site.addsitedir(sys.argv[2]);"
        "import lora_fast, lora_fast.kernels.limits, importlib.util as util;"
        "print(lora_fast.__file__, lora_fast.kernels.__file__, util.find_spec('kernels'))"
    )
    packages = str(Path(torch.__file__).parents[1])
    folder = {"parent": entry.parent, "clone": entry}[place]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-S", "-c", code, packages, str(editable)]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
    package = entry / "lora_fast"
    wanted = [str(package / "__init__.py"), str(package / "kernels" / "__init__.py"), "None"]
    assert done.stdout.split() == wanted, done.stderr


def imported(path: Path) -> set[tuple[str, ...]]:
    """The modules and names of lora_fast that a file imports, wherever in the file, as paths below lora_fast/."""
    package = path.relative_to(ROOT / "lora_fast").parent.parts
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            module = (*package[: len(package) - node.level + 1], *(node.module or "").split("."))
            names |= {tuple(filter(None, (*module, name.name))) for name in node.names}
    return names


SOURCES = sorted(
    p for p in (ROOT / "lora_fast").rglob("*.py") if "kernels" not in p.relative_to(ROOT / "lora_fast").parts
)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT / "lora_fast")))
def test_imports_run_downwards(path):
    room, *inside = path.relative_to(ROOT / "lora_fast").with_suffix("").parts
    if room == "__init__":
        return
    for name in imported(path):
        if name[0] in DEPTH:
            assert DEPTH[room] <= DEPTH[name[0]], f"{path} imports {'.'.join(name)}"
        if inside[:1] == ["reference"]:  # the twins depend on nothing but each other, and on whether a mode looks
            assert name[:2] in [*SHARED, ("ops", "reference"), ("ops", "observers")], f"{path} imports {'.'.join(name)}"
        if room not in ("ops", "batches", "cli"):
            assert name[:2] in SHARED or name[0] != "kernels", f"{path} imports {'.'.join(name)}"
            assert name[:2] != ("ops", "reference"), f"{path} imports {'.'.join(name)}"


@pytest.mark.parametrize("path", sorted((ROOT / "lora_fast" / "kernels").rglob("*.py")), ids=lambda path: path.stem)
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


def extras() -> dict[str, list[Requirement]]:
    """Returns extra → requirements of setup.py; those of the package itself are under ""."""
    arguments = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", arguments.update)
        patch.chdir(ROOT)
        runpy.run_path(str(ROOT / "setup.py"))
    groups = {"": arguments["install_requires"], **arguments["extras_require"]}
    return {extra: [Requirement(text) for text in group] for extra, group in groups.items()}


def declared() -> list[Requirement]:
    """Returns the requirements of setup.py with those of all extras, but for the libraries of tests/works_with and of
    quantised weights, which run with one version."""
    groups = extras()
    only_there = with_one_version()
    return [wanted for group in groups.values() for wanted in group if wanted.name not in only_there]


def with_one_version() -> set[str]:
    """Returns the libraries that the extras works-with and quantized add to the extra hf."""
    groups = extras()
    wanted = groups["works-with"] + groups["quantized"]
    return {requirement.name for requirement in wanted} - {requirement.name for requirement in groups["hf"]}


def test_lower_bounds_are_the_oldest_tested_versions():
    oldest = pinned("constraints-oldest.txt")
    bounds = {(requirement.name, bound.version) for requirement in declared() for bound in requirement.specifier}
    different = [
        f"{name} {bound}, tested {oldest[name]}" for name, bound in bounds if Version(bound) != Version(oldest[name])
    ]
    assert len(bounds) > 15 and not different


def test_installing_the_package_leaves_the_triton_of_torch_alone():
    required = [requirement.name for requirement in declared() if requirement.name == "triton"]
    assert required == ["triton"]  # in the extra of that name and in no other list


def test_pinned_libraries_satisfy_the_extras():
    pins, groups = pinned("constraints.txt"), extras()
    libraries = [wanted for wanted in groups["works-with"] + groups["quantized"] if wanted.name in with_one_version()]
    assert len(libraries) >= 10 and all(pins[wanted.name] in wanted.specifier for wanted in libraries)


@pytest.mark.parametrize("file", ["constraints-oldest.txt", "constraints-newest.txt"])
def test_files_of_versions_name_the_same_packages(file):
    elsewhere = {"setuptools", "typer-slim"} | with_one_version()  # transformers 5.0 needs typer-slim
    assert set(pinned(file)) - elsewhere == set(pinned("constraints.txt")) - elsewhere


@pytest.mark.parametrize("file", ["constraints-oldest.txt", "constraints.txt", "constraints-newest.txt"])
def test_pinned_triton_is_the_one_that_torch_was_built_for(file):
    versions = pinned(file)
    release = platforms.TRITONS[".".join(versions["torch"].split(".")[:2])]
    assert Version(versions["triton"]) in Requirement(f"triton~={release}.0").specifier


def test_oldest_triton_is_the_lower_bound():
    bound = next(requirement for requirement in declared() if requirement.name == "triton")
    assert str(bound.specifier) == f">={platforms.NEEDED_TRITON}"
