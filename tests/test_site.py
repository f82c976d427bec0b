"""The built site: links and anchors lead somewhere, pages fit the screen, links are readable, search finds names.

`zensical build --strict` comes first; without its folder `site`, there is nothing to look at.
"""

from __future__ import annotations

import functools
import http.server
import shutil
import threading
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urldefrag

import pytest

SITE = Path(__file__).parent.parent / "site"
if not (SITE / "index.html").exists():
    pytest.skip("there is no built site: run `zensical build --strict`", allow_module_level=True)
PAGES = sorted(path for path in SITE.rglob("*.html") if path.name != "404.html")


class Page(HTMLParser):
    """The anchors of a page, and what it links to."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.anchors, self.links = {"", "__skip", "__toc"}, set[str]()
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.anchors |= {given[name] or "" for name in ("id", "name") if name in given}
        self.links |= {given[name] or "" for name in ("href", "src") if name in given}


read = functools.cache(Page)


def test_links_and_anchors_lead_somewhere() -> None:
    lost, found = [], 0
    for page in PAGES:
        for link in read(page).links:
            target, anchor = urldefrag(unquote(link))
            if "://" in target or target.startswith(("data:", "mailto:", "/")):
                continue  # the page for missing addresses alone starts at the root
            path = (page.parent / target.partition("?")[0]).resolve() if target else page
            path = path / "index.html" if path.is_dir() else path
            found += 1
            if not path.exists() or (path.suffix == ".html" and anchor not in read(path).anchors):
                lost.append(f"{page.relative_to(SITE)}: {link}")
    assert not lost
    assert found > 3000


def test_there_are_links_for_editing_only_where_the_repository_has_an_address() -> None:
    editing = [link for page in PAGES for link in read(page).links if "/edit/" in link]
    assert all(link.startswith("https://") for link in editing)


def test_fields_of_results_have_anchors() -> None:
    anchors = read(SITE / "api/wrapper/index.html").anchors
    assert {"dynskip.SkipOutput.macs", "dynskip.SkipOutput.stopped_at", "dynskip.StopOrForward.run_clip"} <= anchors


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="the browser is driven by Playwright's Python package")
    chromium = shutil.which("chromium")
    if not chromium:
        pytest.skip("there is no Chromium on this machine")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(SITE))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.mark.parametrize("width", [390, 1400])
def test_pages_fit_the_screen(browser: Any, address: str, width: int) -> None:
    tab = browser.new_page(viewport={"width": width, "height": 900})
    wide = []
    for page in PAGES:
        tab.goto(address + page.relative_to(SITE).as_posix(), wait_until="domcontentloaded")
        if (needed := tab.evaluate("document.documentElement.scrollWidth")) > width:
            wide.append((page.relative_to(SITE).as_posix(), needed))
    tab.close()
    assert not wide


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_links_are_readable(browser: Any, address: str, scheme: str) -> None:
    tab = browser.new_page(color_scheme=scheme)
    tab.goto(f"{address}gates/")
    # The browser draws both colours, whatever notation they are written in.
    colours = """() => {
        const draw = colour => {
            const context = new OffscreenCanvas(1, 1).getContext("2d")
            context.fillStyle = colour
            context.fillRect(0, 0, 1, 1)
            return [...context.getImageData(0, 0, 1, 1).data].slice(0, 3)
        }
        const link = document.querySelector(".md-content p a[href]")
        return [draw(getComputedStyle(link).color), draw(getComputedStyle(document.body).backgroundColor)]
    }"""
    bright, dark = sorted((luminance(colour) for colour in tab.evaluate(colours)), reverse=True)
    tab.close()
    assert (bright + 0.05) / (dark + 0.05) >= 4.5


def luminance(colour: list[int]) -> float:
    """Return the relative luminance of a colour, as WCAG defines it."""
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in (value / 255 for value in colour)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_search_finds_names_and_words(browser: Any, address: str) -> None:
    tab = browser.new_page()
    tab.goto(address)
    tab.click(".md-search__button")
    wanted = {
        "serve_streams": "api/wrapper/?h=serve_streams#dynskip.StopOrForward.serve_streams",
        "run_clip": "api/wrapper/?h=run_clip#dynskip.StopOrForward.run_clip",
        "resnet50": "api/sofnet/?h=resnet50#dynskip.sofnet.resnet50_v1",
        "mp4": "training/?h=mp4#data",
        "license": "contributing/?h=license#license",
        "cite": "cite/?h=cite",
        "troubleshooting": "troubleshooting/?h=troubleshooting",
    }
    for words, page in wanted.items():
        tab.keyboard.press("Control+a")
        tab.keyboard.type(words)
        tab.locator(f'a[href$="{page}"]').first.wait_for(state="attached", timeout=10_000)
    tab.close()
