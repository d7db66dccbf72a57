"""docs/works_with.md lists the workflows of these tests, and only these."""

import ast
import re
from pathlib import Path

import pytest
from pinned_versions import ROOT, pinned

PAGE = ROOT / "docs" / "works_with.md"
FILES = [path for path in sorted(Path(__file__).parent.glob("test_*.py")) if path != Path(__file__)]
HEAD = ["| what you do | what was compared |", "|---|---|"]
FLAG = " (`-m budget`)"  # behind the title of a workflow that a plain call of pytest leaves out


def constants(module: ast.Module) -> dict[str, str]:
    """Returns the strings that a module assigns to names."""
    return {
        statement.targets[0].id: statement.value.value
        for statement in module.body
        if isinstance(statement, ast.Assign)
        and isinstance(statement.targets[0], ast.Name)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    }


def row(test: ast.FunctionDef, names: dict[str, str]) -> str:
    """Returns a test's row of the page."""
    calls = [call for call in test.decorator_list if isinstance(call, ast.Call)]
    calls = [call for call in calls if ast.unparse(call.func) == "workflow"]
    assert len(calls) == 1, f"{test.name} has no decorator @workflow"
    title, compared = (names[text.id] if isinstance(text, ast.Name) else text.value for text in calls[0].args)
    is_long = any(ast.unparse(mark) == "pytest.mark.budget" for mark in test.decorator_list)
    return f"| {title}{FLAG if is_long else ''} | {compared} |".replace("\n", " ")


def expected() -> dict[str, list[str]]:
    """Returns heading → rows of every library, from the sources of the tests."""
    sections: dict[str, list[str]] = {}
    versions = pinned("constraints.txt")
    for path in FILES:
        module = ast.parse(path.read_text(encoding="utf-8"))
        names = constants(module)
        tests = [part for part in module.body if isinstance(part, ast.FunctionDef) and part.name.startswith("test_")]
        heading = f"{names['LIBRARY']} {versions.get(names['LIBRARY'], '')}".rstrip()
        sections.setdefault(heading, []).extend(row(test, names) for test in tests)
    return dict(sorted(sections.items()))


def written() -> dict[str, list[str]]:
    """Returns heading → rows of the page's sections that have a table of workflows."""
    sections = re.findall(r"^### (.+)\n((?:(?!#).*\n?)*)", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    tables = {heading: [line for line in text.splitlines() if line.startswith("|")] for heading, text in sections}
    return {heading: lines[len(HEAD) :] for heading, lines in tables.items() if lines[: len(HEAD)] == HEAD}


def tables(sections: dict[str, list[str]]) -> str:
    return "\n\n".join("\n".join([f"### {heading}", "", *HEAD, *rows]) for heading, rows in sections.items())


def test_page_lists_exactly_these_workflows():
    assert written() == expected(), f"docs/works_with.md needs these tables:\n\n{tables(expected())}\n"


def test_page_counts_its_workflows():
    rows = [line for lines in expected().values() for line in lines]
    shown = re.search(r"^(\d+) workflows of (\d+) libraries", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert shown, "docs/works_with.md needs its number of workflows"
    assert tuple(map(int, shown.groups())) == (len(rows), len(expected()))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_files_skip_with_a_reason_without_their_library(path):
    source = path.read_text(encoding="utf-8")
    library = constants(ast.parse(source))["LIBRARY"]
    package = library.replace("-", "_")
    skips = re.search(rf'pytest\.importorskip\(\s*"{package}",\s*reason=', source)
    assert skips or library in ("accelerate", "peft", "torch", "transformers")  # in every environment of the tests
