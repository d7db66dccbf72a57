"""Checks README.md, CONTRIBUTING.md and docs/: links resolve, every Python example runs by itself and prints
what its comments promise, every command exists with its options, every path that is named exists."""

import re
import shlex
from importlib.util import find_spec
from pathlib import Path

import pytest
import typer

from lora_fast.cli import app
from lora_fast.cli.inputs import method_options
from lora_fast.cli.reproduce.experiments import EXPERIMENTS

ROOT = Path(__file__).resolve().parents[1]
README, CONTRIBUTING = ROOT / "README.md", ROOT / "CONTRIBUTING.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [README, CONTRIBUTING, *DOCS]
# Names of what the reader of CONTRIBUTING.md adds, and of placeholders.
IMAGINED = re.compile(r"/norms\.py|row_norms|sign[-_]lora|half_lora|three_bits|trivial|/x/")
FOLDERS = "aot|bench|docs|lora_fast|tests"


def python_blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def links(page: Path) -> list[tuple[Path, str]]:
    """Returns the file and the heading of every link to a file of the repository."""
    targets = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    parts = [target.partition("#") for target in targets if not target.startswith("http")]
    return [((page.parent / path).resolve() if path else page, anchor) for path, _, anchor in parts]


def anchors(page: Path) -> set[str]:
    """Returns the anchors of a page's headings, by GitHub's rule."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands(page: Path) -> list[str]:
    """Returns the lines of shell blocks, and the pieces of code in the text that begin like a command."""
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    inline = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))
    inline = [code for code in inline if code.startswith(("lora-fast ", "make ", "python ", ".venv/bin/"))]
    lines = [line.partition(" #")[0].strip() for block in blocks for line in block.splitlines() if line]
    return [line for line in lines + inline if not IMAGINED.search(line)]


def paths(page: Path) -> list[str]:
    """Returns the paths of the repository that a page names in inline code, or in the tree of CONTRIBUTING.md."""
    text = page.read_text(encoding="utf-8")
    inline = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))
    named = [code for code in inline if re.fullmatch(rf"(?:{FOLDERS})/[\w./]*", code)]
    return [path for path in named + tree(text) if not IMAGINED.search(path)]


def tree(text: str) -> list[str]:
    """Returns the paths of a page's tree: lines of a name and its description, two spaces deeper in each folder."""
    paths, folders = [], []
    for block in re.findall(r"^```\n(lora_fast/.*?)^```", text, re.DOTALL | re.MULTILINE):
        for indent, name in re.findall(r"^( *)([\w./]+)", block, re.MULTILINE):
            folders[len(indent) // 2 :] = [name]
            paths.append("".join(folders))
    return paths


NEEDS_BITSANDBYTES = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
EXAMPLES = [
    pytest.param(code, id=f"{page.stem}-{i}", marks=NEEDS_BITSANDBYTES if "BitsAndBytesConfig" in code else ())
    for page in PAGES
    for i, code in enumerate(python_blocks(page))
]
COMMANDS = list(dict.fromkeys(command for page in PAGES for command in commands(page)))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_resolve(page):
    assert links(page)
    broken = [target for target, _ in links(page) if not target.exists()]
    broken += [anchor for target, anchor in links(page) if anchor and anchor not in anchors(target)]
    assert not broken


def test_readme_links_every_page():
    assert {CONTRIBUTING, *DOCS} <= {target for target, _ in links(README)}


def test_readme_has_at_most_1500_words():
    before, table = README.read_text(encoding="utf-8").split("<!-- gpu table")  # bench/readme_table.py writes the table
    assert len(before.split()) + len(table.partition("<!-- end of gpu table -->")[2].split()) <= 1500


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_named_paths_exist(page):
    missing = [path for path in paths(page) if not (ROOT / path).exists()]
    assert not missing


def test_tree_has_every_folder():
    listed = tree(CONTRIBUTING.read_text(encoding="utf-8"))
    sources = [path.relative_to(ROOT) for path in (ROOT / "lora_fast").glob("**/__init__.py")]
    folders = {f"{source.parent}/" for source in sources}
    assert len(folders) > 20 and folders - {"lora_fast/cli/reproduce/experiments/"} <= set(listed)


@pytest.mark.parametrize("code", EXAMPLES)
def test_examples_run_alone_and_print_what_they_promise(code, tmp_path, monkeypatch, capsys):
    """A comment behind a print is a line of its output."""
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "example", "exec"), {"__name__": "example"})
    promised = re.findall(r"^print\(.*\) +# (.+)$", code, re.MULTILINE)
    assert set(promised) <= set(capsys.readouterr().out.splitlines())


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.encode("ascii", "ignore").decode())
def test_commands_exist_with_their_options(command):
    words = shlex.split(command.removeprefix(".venv/bin/"))
    if words[-1] == "…" and not words[-2].startswith("--"):
        words.pop()
    check(words)


@pytest.mark.parametrize(("command", "message"), [
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
def test_check_finds_commands_that_do_not_exist(command, message):
    with pytest.raises(Exception, match=message):
        check(shlex.split(command))


def check(words: list[str]) -> None:
    """Raises unless the command, its options and the files it names exist."""
    program, *arguments = words
    if program == "lora-fast":
        check_lora_fast(arguments)
    elif program == "make":
        assert re.search(rf"^{arguments[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), words
    elif program == "python":
        source = (ROOT / arguments[0]).read_text(encoding="utf-8")
        assert all(f'"{word}"' in source for word in arguments if word.startswith("-")), words
    else:
        assert program in ("pytest", "pip"), words
        assert all((ROOT / word).exists() for word in arguments if word.endswith(".py") or word.startswith("tests/")), (
            words
        )


def check_lora_fast(words: list[str]) -> None:
    name, *arguments = words
    subcommands = typer.main.get_command(app).commands
    assert name in subcommands or words == ["--help"], words
    if name not in subcommands:
        return
    try:
        values = subcommands[name].make_context(name, arguments).params
    except typer.Exit as help_page:
        assert help_page.exit_code == 0
        return
    for method in values.get("method") or ():
        method_options.read(method)
    assert set(values.get("names") or ()) <= set(EXPERIMENTS), words
