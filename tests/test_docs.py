"""Every Python block of the documentation runs and prints what the page says; links and API pages are complete."""

from __future__ import annotations

import contextlib
import doctest
import io
import json
import re
import runpy
from pathlib import Path

import pytest
import torch

import dynskip
import dynskip.video

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize(
    "page", [page for page in PAGES if "```python" in page.read_text()], ids=lambda page: page.name
)
def test_the_pages_code_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict[str, object] = {"__name__": "__main__"}
    block_and_output = r'^```python\n(.*?)^```$(?:\n\n```text title="Output"\n(.*?)^```$)?'
    for block in re.finditer(block_and_output, page.read_text(), re.MULTILINE | re.DOTALL):
        line = page.read_text()[: block.start(1)].count("\n")
        if page.name == "README.md":  # it says that each of its blocks runs alone
            names = {"__name__": "__main__"}
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile("\n" * line + block[1], str(page), "exec"), names)
        if block[2]:
            assert_prints(printed.getvalue(), block[2])


def assert_prints(printed: str, expected: str) -> None:
    """Compare words exactly, and numbers within a quarter: decoders and processors round differently."""
    number = r"(?<!\w)\d+(?:\.\d+)?"
    assert re.sub(number, "N", printed).split() == re.sub(number, "N", expected).split()
    found, wanted = ([float(text) for text in re.findall(number, each)] for each in (printed, expected))
    assert found == pytest.approx(wanted, rel=0.25, abs=0)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_pages_links_to_files_work(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)#\s]+)", text):
        assert "://" in target or (page.parent / target).exists(), target


@pytest.mark.parametrize(
    "name", sorted(name for name in dynskip.__all__ if ">>> " in (getattr(dynskip, name).__doc__ or ""))
)
def test_the_examples_of_the_api_print_what_they_say(name: str) -> None:
    names = {"torch": torch, **{public: getattr(dynskip, public) for public in dynskip.__all__}}
    example = doctest.DocTestParser().get_doctest(getattr(dynskip, name).__doc__, names, name, None, None)
    assert doctest.DocTestRunner().run(example).failed == 0


def test_the_pages_name_the_version_that_they_describe() -> None:
    for name, text in (
        ("index.md", f"This is dynskip\n{dynskip.__version__}."),
        ("cite.md", f"{{{dynskip.__version__}}}"),
    ):
        assert text in (ROOT / "docs" / name).read_text(encoding="utf-8")


def test_every_public_name_has_an_api_page() -> None:
    text = "".join(page.read_text() for page in (ROOT / "docs/api").glob("*.md"))
    documented = {name.rpartition(".")[2] for name in re.findall(r"^::: ([\w.]+)$", text, re.MULTILINE)}
    assert not {*dynskip.__all__, *dynskip.video.__all__} - documented


def test_every_page_has_its_place_in_the_navigation() -> None:  # the site's build does not ask for this
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2]
    pages = {page.relative_to(ROOT / "docs").as_posix() for page in PAGES[1:]}
    assert set(re.findall(r"[\w/-]+\.md", navigation)) == pages


def test_commands_in_the_pages_are_those_of_the_examples() -> None:
    found = 0
    for page in PAGES:
        for block in re.finditer(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL):
            for line in block[2].replace("\\\n", " ").splitlines() if block[1] in ("", "bash") else ():
                if script := re.search(r"\b(examples/\w+\.py)(.*?)(?:\s#|$)", line):
                    source = (ROOT / script[1]).read_text()
                    unknown = [o for o in re.findall(r"\s(--[\w-]+)", script[2]) if f'"{o}"' not in source]
                    assert not unknown, f"{page.name}: {line}"
                    found += 1
    assert found > 20


def test_the_recipe_is_explained_block_by_block() -> None:
    blocks = re.findall(r"^# -{20,} (.+)$", (ROOT / "examples/sofnet_activitynet.py").read_text(), re.MULTILINE)
    headings = re.findall(r"^## (.+)$", (ROOT / "docs/copy-the-recipe.md").read_text(), re.MULTILINE)
    assert [heading.lower() for heading in headings][: len(blocks)] == blocks


def test_the_tutorials_page_is_its_notebook() -> None:
    notebook = json.loads((ROOT / "docs/tutorial.ipynb").read_text(encoding="utf-8"))
    page = runpy.run_path(str(ROOT / "docs/tutorial.py"))["page"]
    assert (ROOT / "docs/tutorial.md").read_text(encoding="utf-8") == page(notebook)
