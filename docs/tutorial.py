"""Run docs/tutorial.ipynb, store what its cells print, and write docs/tutorial.md from it."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent
NOTEBOOK = DOCS / "tutorial.ipynb"
PAIR = r"\1.svg#gh-light-mode-only)\n\1-dark.svg#gh-dark-mode-only)"  # a notebook shows one picture, a page one of two


def page(notebook: dict[str, Any]) -> str:
    """The notebook as Markdown: text, code, and what was printed."""
    parts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(re.sub(r"(!\[.*\]\(images/\w+)\.svg\)", PAIR, source))
            continue
        parts.append(f"```python\n{source}\n```")
        if printed := "".join(
            line for output in cell["outputs"] for line in output["text"]
        ):
            parts.append(f'```text title="Output"\n{printed}```')
    return "\n\n".join(parts) + "\n"


def run(notebook: dict[str, Any]) -> dict[str, Any]:
    """Run the code cells in order and store their outputs; return the names that they made."""
    names: dict[str, Any] = {"__name__": "__main__"}
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for number, cell in enumerate(code, 1):
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec("".join(cell["source"]), names)
        lines = printed.getvalue().splitlines(keepends=True)
        cell["execution_count"] = number
        cell["outputs"] = (
            [{"name": "stdout", "output_type": "stream", "text": lines}]
            if lines
            else []
        )
    return names


if __name__ == "__main__":
    read = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        made = run(read)
        os.chdir(DOCS)
    sys.path.append(str(DOCS.parent / "benchmarks"))
    import common

    draw = functools.partial(
        made["plot"].accuracy_compute, made["curves"], metric="answers kept"
    )
    common.save_pair(lambda dark: draw(dark=dark), DOCS / "images/tutorial.svg")
    NOTEBOOK.write_text(
        json.dumps(read, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    (DOCS / "tutorial.md").write_text(page(read), encoding="utf-8")
