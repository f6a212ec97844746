"""What the READMEs tell a reader to run exists and runs."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
READMES = [ROOT / "README.md", *sorted(ROOT.glob("packages/*/README.md"))]
TEXTS = {str(path.relative_to(ROOT)): path.read_text() for path in READMES}
NOXFILE = ast.parse((ROOT / "noxfile.py").read_text())
SNIPPETS = [
    pytest.param(snippet, id=f"{name}-{i}")
    for name, text in TEXTS.items()
    for i, snippet in enumerate(
        re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    )
]


def noxfile_value(name: str) -> list[str]:
    """The list of strings that noxfile.py assigns to a name."""
    for node in NOXFILE.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            return ast.literal_eval(node.value)
    raise LookupError(name)


def session_names() -> set[str]:
    """The functions of noxfile.py that are sessions."""
    return {
        node.name
        for node in NOXFILE.body
        if isinstance(node, ast.FunctionDef)
        and any(
            ast.unparse(decorator).startswith("nox.session") for decorator in node.decorator_list
        )
    }


@pytest.mark.parametrize("name", TEXTS)
def test_sessions_in_readme_exist(name: str):
    named = re.findall(r"nox -s \"?(\w+)", TEXTS[name])
    assert set(named) <= session_names()


@pytest.mark.parametrize("name", TEXTS)
def test_torch_versions_in_readme_are_in_the_matrix(name: str):
    named = re.findall(r"torch='([\d.]+)'|torch==([\d.]+\d)", TEXTS[name])
    assert {a or b for a, b in named} <= set(noxfile_value("TORCH_VERSIONS"))


def test_readme_names_both_commands_and_the_matrix():
    text = TEXTS["README.md"]
    assert re.search(r"^\./nox -s quickstart$", text, re.MULTILINE)
    assert re.search(r"^\./nox$", text, re.MULTILINE)
    versions = noxfile_value("TORCH_VERSIONS")
    assert f"{', '.join(versions[:-1])} and {versions[-1]}" in text


def test_readme_has_snippets():
    assert any("README.md-" in str(snippet.id) for snippet in SNIPPETS)


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_snippet_runs(snippet: str, tmp_path: Path):
    result = subprocess.run(
        [sys.executable, "-I", "-c", snippet],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, f"{snippet}\n{result.stderr}"


@pytest.mark.parametrize("name", TEXTS)
def test_relative_links_in_readme_exist(name: str):
    for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", TEXTS[name]):
        # Wheels are tested where their sources are not.
        if not {"src", "csrc"} & set(Path(link).parts):
            assert ((ROOT / name).parent / link).exists(), link
