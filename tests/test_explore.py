"""The explorer page, in a real browser without a screen."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

for needed in ("gradio", "playwright.sync_api", "av", "matplotlib", "safetensors", "tqdm"):
    pytest.importorskip(needed)
CHROMIUM = shutil.which("chromium")
if CHROMIUM is None:
    pytest.skip("there is no Chromium here: apt-get install chromium", allow_module_level=True)

from helpers import save_tiny_sofnet  # noqa: E402
from media import picture, write_video  # noqa: E402
from playwright.sync_api import expect, sync_playwright  # noqa: E402

from dynskip import video  # noqa: E402
from dynskip.video import stick_figures  # noqa: E402

SCRIPT = Path(__file__).parents[1] / "examples/explore.py"
PATIENCE = 60_000  # milliseconds, for slow machines
# A process that is started in the background ignores Ctrl-C, and so do those that it starts.
HEEDING_CTRL_C = """
import runpy, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path, Path]]:
    """Serve the page as its users do; return its address, a folder, and where uploads lie."""
    folder, uploads = tmp_path_factory.mktemp("explore"), tmp_path_factory.mktemp("uploads")
    model = save_tiny_sofnet(folder / "model", video.Preprocessing(32, 6))
    data = stick_figures.render_set(folder / "data", train_per_class=1, test_per_class=1, size=48, num_frames=24)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [SCRIPT, model, "--data", data, "--port", port, "--max-mb", 1, "--max-frames", 100]
    environment = {**os.environ, "TMPDIR": str(uploads), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen([sys.executable, "-c", HEEDING_CTRL_C, *map(str, command)], env=environment) as process:
        try:
            address = f"http://127.0.0.1:{port}/"
            for _ in range(600):
                try:
                    urllib.request.urlopen(address)
                    break
                except OSError:
                    assert process.poll() is None
                    time.sleep(0.1)
            yield address, folder, uploads
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(60)
            finally:
                process.kill()
    assert not list(uploads.rglob("dynskip-*"))


@pytest.fixture
def page(served: tuple[str, Path, Path]) -> Iterator[Any]:
    """Open the page; whatever it asks of other machines fails, and fails the test."""
    foreign: list[str] = []

    def only_here(route: Any) -> None:
        if route.request.url.startswith((served[0], "data:", "blob:")):
            route.continue_()
        else:
            foreign.append(route.request.url)
            route.abort()

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        tab = browser.new_page()
        tab.set_default_timeout(PATIENCE)
        tab.route("**/*", only_here)
        tab.goto(served[0])
        tab.wait_for_selector("input[type=file]", state="attached")
        yield tab
        browser.close()
    assert foreign == []


def test_upload_result_slider_changed_result(page: Any, served: tuple[str, Path, Path]) -> None:
    _, folder, uploads = served
    page.set_input_files("input[type=file]", write_video(folder / "blocks.mp4"))
    strip, costs = page.locator(".strip img"), page.locator(".costs")
    expect(costs).to_contain_text("frames decoded", timeout=PATIENCE)
    expect(page.get_by_text("blocks.mp4")).to_be_visible()
    before = strip.get_attribute("alt")
    assert "used" in before
    assert not list(uploads.rglob("blocks.mp4"))
    expect(page.get_by_text("labelled videos")).to_be_visible(timeout=PATIENCE)
    threshold = page.locator("input[type=number]").first
    threshold.fill("1")
    threshold.blur()
    expect(strip).not_to_have_attribute("alt", before, timeout=PATIENCE)
    expect(costs).to_contain_text("not measured")
    expect(page.get_by_text("Frames: 0 used")).to_be_visible()
    page.get_by_role("button", name="Measure").click()
    expect(costs).not_to_contain_text("not measured", timeout=PATIENCE)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("damaged.mp4", "damaged.mp4: begins with zeros: its download never got that far."),
        ("long.mp4", "long.mp4 has 120 frames; up to 100 can be uploaded."),
    ],
)
def test_a_file_that_cannot_be_shown_gives_its_reason(
    page: Any, served: tuple[str, Path, Path], name: str, reason: str
) -> None:
    _, folder, uploads = served
    if name == "damaged.mp4":
        (folder / name).write_bytes(bytes(2000))
    else:
        write_video(folder / name, pictures=[picture(number) for number in range(120)])
    page.set_input_files("input[type=file]", folder / name)
    expect(page.get_by_role("alert")).to_contain_text(reason, timeout=PATIENCE)
    assert not list(uploads.rglob(name))


def test_a_file_that_is_too_large_is_not_taken(page: Any, served: tuple[str, Path, Path]) -> None:
    _, folder, uploads = served
    (folder / "large.mp4").write_bytes(bytes(1_100_000))
    page.set_input_files("input[type=file]", folder / "large.mp4")
    expect(page.get_by_text("Error", exact=True).first).to_be_visible(timeout=PATIENCE)
    assert not list(uploads.rglob("large.mp4"))
