"""The few lines that wrap, calibrate and run a model: the same in the script and in the README, few, and working."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "examples" / "wrap_your_backbone.py"


def user_code() -> str:
    code = re.search(r"^# -- from here\n(.*?)^# -- to here$", SCRIPT.read_text(), re.MULTILINE | re.DOTALL)
    assert code is not None
    return code[1]


def test_it_is_at_most_fifteen_lines() -> None:
    imports = [line for line in SCRIPT.read_text().splitlines() if line.startswith("from dynskip import")]
    assert len(imports) == 1
    assert len([line for line in user_code().splitlines() if line.strip()]) + len(imports) <= 15


def test_the_readme_shows_the_same_lines() -> None:
    # The README's own blocks are executed by tests/test_docs.py.
    assert f"\n\n{user_code()}```" in (ROOT / "README.md").read_text()


def test_the_script_skips_and_answers(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("av")
    done = runpy.run_path(str(SCRIPT))
    printed = capsys.readouterr().out
    model, clips, video = done["model"], done["clips"], done["video"]
    found = re.fullmatch(r"class (\d), (\d+) frames used, (\d\.\d{3}) GMACs\n", printed)
    assert found is not None
    output = model(video[None])
    assert int(found[1]) == int(output.logits.argmax())
    assert int(found[2]) == int(output.used.sum())
    assert 0 < int(found[2]) < len(video)  # something is skipped
    assert float(output.macs) < float(model(video[None], dense=True).macs)
    agree = model(clips).logits.argmax(-1) == model(clips, dense=True).logits.argmax(-1)
    assert agree.double().mean() >= 0.95
