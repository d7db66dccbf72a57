"""The pages of docs/ and the README: links lead somewhere, examples run and print what they say, commands exist
with the options that they are shown with, pictures are those that their code draws."""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest
import typer

from lora_fast.cli import app
from lora_fast.cli.inputs import method_options
from lora_fast.cli.reproduce.experiments import EXPERIMENTS

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
README = ROOT / "README.md"


def python_blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def links(page: Path) -> list[str]:
    """Of links and images, those to files of the repository."""
    targets = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    return [target.partition("#")[0] for target in targets if not target.startswith(("http", "#"))]


def commands(page: Path) -> list[str]:
    """Lines of shell blocks, and pieces of code in the text that begin like a command."""
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    inline = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))
    inline = [code for code in inline if code.startswith(("lora-fast ", "make ", "python ", ".venv/bin/"))]
    lines = [line.partition(" #")[0].strip() for block in blocks for line in block.splitlines() if line]
    return lines + inline


EXAMPLES = [pytest.param(code, id=f"{page.stem}-{i}") for page in PAGES for i, code in enumerate(python_blocks(page))]
COMMANDS = list(dict.fromkeys(command for page in [README, *PAGES] for command in commands(page)))


@pytest.mark.parametrize("page", [README, *PAGES], ids=lambda page: page.stem)
def test_links_resolve(page):
    assert links(page)
    missing = [target for target in links(page) if not (page.parent / target).exists()]
    assert not missing


def test_the_readme_links_every_page():
    assert {f"docs/{page.name}" for page in PAGES} <= set(links(README))


@pytest.mark.parametrize("code", EXAMPLES)
def test_examples_run_and_print_what_they_say(code, tmp_path, monkeypatch, capsys):
    """What stands in a comment behind a print is a line of its output."""
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "example", "exec"), {"__name__": "example"})
    promised = re.findall(r"^print\(.*\) +# (.+)$", code, re.MULTILINE)
    assert set(promised) <= set(capsys.readouterr().out.splitlines())


def test_the_readme_s_first_example_runs_and_its_other_fragments_are_python(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, *fragments = [compile(code, "README.md", "exec") for code in python_blocks(README)]
    assert fragments
    exec(first, {"__name__": "example"})
    assert (tmp_path / "my-adapter" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.encode("ascii", "ignore").decode())
def test_commands_exist_with_their_options(command):
    words = shlex.split(command.removeprefix(".venv/bin/"))
    if words[-1] == "…" and not words[-2].startswith("--"):
        words.pop()
    check(words)


@pytest.mark.parametrize(("command", "said"), [
    ("lora-fast profil", "profil"),
    ("lora-fast profile --ranks 4", "--ranks"),
    ("lora-fast finetune --rank many", "integer"),
    ("lora-fast finetune --method iloar", "iloar"),
    ("lora-fast reproduce nothing", "nothing"),
    ("make all", "all"),
    ("python bench/none.py", "none"),
    ("python bench/gpu.py --wet-run", "wet-run"),
    ("pytest tests/test_none.py", "none"),
    ("rm -r runs", "rm"),
])  # fmt: skip
def test_a_command_that_does_not_exist_is_found(command, said):
    with pytest.raises(Exception, match=said):
        check(shlex.split(command))


def check(words: list[str]) -> None:
    """Raises unless the command, its options and the files it names exist."""
    program, *rest = words
    if program == "lora-fast":
        check_lora_fast(rest)
    elif program == "make":
        assert re.search(rf"^{rest[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), words
    elif program == "python":
        source = (ROOT / rest[0]).read_text(encoding="utf-8")
        assert all(f'"{word}"' in source for word in rest if word.startswith("-")), words
    else:
        assert program in ("pytest", "pip"), words
        assert all((ROOT / word).exists() for word in rest if word.endswith(".py")), words


def check_lora_fast(words: list[str]) -> None:
    name, *rest = words
    subcommands = typer.main.get_command(app).commands
    assert name in subcommands or words == ["--help"], words
    if name not in subcommands:
        return
    try:
        given = subcommands[name].make_context(name, rest).params
    except typer.Exit as asked_for_help:
        assert asked_for_help.exit_code == 0
        return
    for method in given.get("method") or ():
        method_options.read(method)
    assert set(given.get("names") or ()) <= set(EXPERIMENTS), words


def test_pictures_are_what_their_code_draws(tmp_path):
    matplotlib = pytest.importorskip("matplotlib")
    committed = {path.name: path.read_bytes() for path in DOCS.glob("*.svg")}
    assert set(committed) == {target for page in PAGES for target in links(page) if target.endswith(".svg")}
    specification = importlib.util.spec_from_file_location("pictures", DOCS / "pictures.py")
    specification.loader.exec_module(pictures := importlib.util.module_from_spec(specification))
    drawn = {path.name: path.read_bytes() for path in pictures.draw(tmp_path)}
    assert set(drawn) == set(committed)
    if f"Matplotlib v{matplotlib.__version__},".encode() not in next(iter(committed.values())):
        pytest.skip(f"the committed pictures are of another matplotlib than {matplotlib.__version__}: bytes may differ")
    stale = [name for name in drawn if drawn[name] != committed[name]]
    assert not stale, "draw them again: python docs/pictures.py"
