"""The documents keep their word: code runs, and what they name is there.

Tests are named as `tests/test_x.py::test_y`, without the brackets of a parameter; statements are
code spans that begin with `pyro.` or `with `, and stand so in a program or in the document's code.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/*.md")])
EQUATIONS = ROOT / "docs" / "from_equations_to_sites.md"
every_document = pytest.mark.parametrize(
    "path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT))
)


@pytest.fixture
def restored() -> Iterator[None]:
    dtype = torch.get_default_dtype()
    yield
    torch.set_default_dtype(dtype)


def code(text: str) -> str:
    """The Python of a document, every other line blank, so that errors name the right one."""
    lines, python = [], False
    for line in text.splitlines():
        fence = line.startswith("```")
        lines.append(line if python and not fence else "")
        if fence:
            python = line == "```python"
    return "\n".join(lines)


def missing_tests(text: str) -> list[str]:
    """The named tests that no file has."""
    missing = []
    for name, test in re.findall(r"(tests/[\w/]+\.py)(?:::(\w+))?", text):
        path = ROOT / name
        tree = ast.parse(path.read_text(encoding="utf-8")) if path.is_file() else ast.parse("")
        found = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        if not path.is_file() or (test and test not in found):
            missing.append(f"{name}::{test}" if test else name)
    return missing


def missing_links(text: str, folder: Path) -> list[str]:
    """The relative links that lead nowhere."""
    links = re.findall(r"\]\(([^)\s#]+)(?:#[^)\s]*)?\)", text)
    return [link for link in links if "://" not in link and not (folder / link).exists()]


def missing_statements(text: str) -> list[str]:
    """The statements that stand in no program, nor in the code of the document."""
    spans = re.findall(r"`((?:pyro\.\w+\(|with )[^`\n]+)`", text)
    folders = ("models", "guides", "pyro_vi")
    files = [path for folder in folders for path in (ROOT / folder).glob("*.py")]
    programs = [path.read_text(encoding="utf-8") for path in files] + re.findall(
        r"(?s)```python\n(.*?)```", text
    )
    return [span for span in spans if not any(span in program for program in programs)]


def test_the_python_of_the_equations_runs(restored: None) -> None:
    source = code(EQUATIONS.read_text(encoding="utf-8"))
    assert source.count("assert ") >= 5
    exec(compile(source, str(EQUATIONS), "exec"), {})


@every_document
def test_what_a_document_names_is_there(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert not missing_tests(text)
    assert not missing_links(text, path.parent)


def test_the_equations_name_statements_that_are_there() -> None:
    text = EQUATIONS.read_text(encoding="utf-8")
    assert not missing_statements(text)
    assert len(re.findall(r"tests/[\w/]+\.py::test_\w+", text)) >= 30


def test_what_is_not_there_is_found() -> None:
    here = f"tests/{Path(__file__).name}"
    right = f"{here} `{here}::test_what_is_not_there_is_found` [this](docs/posteriors.png)"
    assert not missing_tests(right) and not missing_links(right, ROOT)
    assert missing_tests(f"`{here}::test_of_nothing`") == [f"{here}::test_of_nothing"]
    assert missing_tests("`tests/test_of_nothing.py`") == ["tests/test_of_nothing.py"]
    assert missing_links("[a](docs/nothing.md#part) [b](https://pyro.ai)", ROOT) == [
        "docs/nothing.md"
    ]
    assert missing_statements('`pyro.sample("of nothing", p)`') == ['pyro.sample("of nothing", p)']
    with pytest.raises(AssertionError):
        exec(code("a line\n```math\nx\n```\n```python\nassert not 1\n```\n"), {})


def test_code_keeps_its_lines() -> None:
    text = "one\n```python\ntwo = 2\n```\nfour\n\n```math\nx\n```\n```python\nten = 10\n```\n"
    lines = code(text).split("\n")
    assert [lines[i] for i in (2, 10)] == ["two = 2", "ten = 10"]
    assert sum(map(bool, lines)) == 2
