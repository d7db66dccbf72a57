"""The pages of docs/ and the README: links lead somewhere, examples run and print what they say, pictures are those
that their code draws."""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))


def python_blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def links(page: Path) -> list[str]:
    """Of links and images, those to files of the repository."""
    targets = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    return [target.partition("#")[0] for target in targets if not target.startswith(("http", "#"))]


EXAMPLES = [pytest.param(code, id=f"{page.stem}-{i}") for page in PAGES for i, code in enumerate(python_blocks(page))]


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda page: page.stem)
def test_links_resolve(page):
    assert links(page)
    missing = [target for target in links(page) if not (page.parent / target).exists()]
    assert not missing


def test_the_readme_links_every_page():
    assert {f"docs/{page.name}" for page in PAGES} <= set(links(ROOT / "README.md"))


@pytest.mark.parametrize("code", EXAMPLES)
def test_examples_run_and_print_what_they_say(code, tmp_path, monkeypatch, capsys):
    """What stands in a comment behind a print is a line of its output."""
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "example", "exec"), {"__name__": "example"})
    promised = re.findall(r"^print\(.*\) +# (.+)$", code, re.MULTILINE)
    assert set(promised) <= set(capsys.readouterr().out.splitlines())


@pytest.mark.parametrize("code", python_blocks(ROOT / "README.md"))
def test_the_readme_s_fragments_are_python(code):
    compile(code, "README.md", "exec")


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
