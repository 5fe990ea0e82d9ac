"""The page in a real browser: on a phone, a desktop and paper, light and dark; nothing spills, nothing is fetched."""

from __future__ import annotations

import base64
import io
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from layerroute.report.load import load
from layerroute.report.render import render

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
MAC = "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome"
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--hide-scrollbars",
)
FLAGS += (
    "--disable-background-networking",
    "--disable-extensions",
    "--remote-debugging-pipe",
    "--force-color-profile=srgb",
)
# the browser reads commands from descriptor 3 and answers on 4; a child in between puts the pipes there
LAUNCH = "import os, sys; r, w = map(int, sys.argv[1:3]); r, w = os.dup(r), os.dup(w); os.dup2(r, 3); os.dup2(w, 4); "
LAUNCH += "os.set_inheritable(3, True); os.set_inheritable(4, True); os.execv(sys.argv[3], sys.argv[3:])"


class Browser:
    """Chromium, driven over the DevTools protocol."""

    def __init__(self, program: str, profile: Path) -> None:
        (theirs_in, self._out), (self._in, theirs_out) = os.pipe(), os.pipe()
        arguments = [sys.executable, "-c", LAUNCH, str(theirs_in), str(theirs_out), program, *FLAGS]
        self._process = subprocess.Popen(
            [*arguments, f"--user-data-dir={profile}", "about:blank"],
            pass_fds=(theirs_in, theirs_out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._numbers, self._rest, self.events = itertools.count(1), b"", []
        self._session = None
        target = next(t for t in self.call("Target.getTargets")["targetInfos"] if t["type"] == "page")
        attached = self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(20)
        os.close(self._in)
        os.close(self._out)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters}
        message |= {"sessionId": self._session} if self._session else {}
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while (answer := self._read()).get("id") != number:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            part = os.read(self._in, 1 << 16)
            assert part, "the browser has gone"
            self._rest += part
        line, _, self._rest = self._rest.partition(b"\0")
        return json.loads(line)

    def open(self, page: Path, width: int, dark: bool = False, media: str = "") -> None:
        """Show a page at a width in pixels, and wait until it is loaded."""
        self.events.clear()
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=844, deviceScaleFactor=1, mobile=width < 500
        )
        self.call("Emulation.setEmulatedMedia", media=media, features=[scheme])
        self.call("Page.navigate", url=page.as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._read())

    def evaluate(self, script: str) -> Any:
        return self.call("Runtime.evaluate", expression=script, returnByValue=True)["result"].get("value")

    def screenshot(self, whole: bool = False) -> Image.Image:
        data = self.call("Page.captureScreenshot", captureBeyondViewport=whole, **self._clip(whole))["data"]
        return Image.open(io.BytesIO(base64.b64decode(data)))

    def _clip(self, whole: bool) -> dict[str, Any]:
        if not whole:
            return {}
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        return {"clip": {**size, "scale": 1}}

    def pdf(self) -> bytes:
        return base64.b64decode(self.call("Page.printToPDF", preferCSSPageSize=True, printBackground=True)["data"])

    def complaints(self) -> list[Any]:
        """What the console got."""
        kinds = ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown")
        return [event for event in self.events if event.get("method") in kinds]

    def requests(self) -> list[str]:
        sent = [event for event in self.events if event.get("method") == "Network.requestWillBeSent"]
        return [event["params"]["request"]["url"] for event in sent]


def find_browser() -> str:
    for name in (*BROWSERS, MAC):
        if path := shutil.which(name):
            return path
    pytest.fail(f"no browser ({', '.join(BROWSERS)}): install one, such as with `apt-get install chromium`")


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[Browser]:
    started = Browser(find_browser(), tmp_path_factory.mktemp("profile"))
    yield started
    started.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory, make_evaluation, make_ablation, provenance) -> dict[str, Path]:
    """All that a report can hold; two evaluations side by side; one with every warning and nothing else."""
    root = tmp_path_factory.mktemp("pages")
    seen = provenance()
    seen["training"]["overlap"] = ["a-data-file-with-a-rather-long-name-and-no-place-to-break-it.jsonl.gz"]
    planted, grid = make_evaluation(root / "planted"), make_ablation(root / "grid")
    kinds = {
        "whole": [planted, grid],
        "sides": [planted, make_evaluation(root / "none", "none", 1)],
        "bare": [make_evaluation(root / "bare", "static", full=False, groups=4, provenance=seen)],
    }
    for name, folders in kinds.items():
        (root / f"{name}.html").write_text(render(load(folders), "html"), encoding="utf-8")
    return {name: root / f"{name}.html" for name in kinds}


# of every text that is shown in a chart: what it says, its size on the screen, its box, and its chart's width
TEXTS = """[...document.querySelectorAll('svg.chart')].flatMap((chart, number) => {
  const frame = chart.getBoundingClientRect();
  return frame.width === 0 ? [] : [...chart.querySelectorAll('text')].map(text => {
    const box = text.getBoundingClientRect(), scale = chart.getScreenCTM().a;
    return {number, words: text.textContent, size: parseFloat(getComputedStyle(text).fontSize) * scale,
            left: box.left - frame.left, right: box.right - frame.left, width: frame.width,
            top: box.top - frame.top, bottom: box.bottom - frame.top, height: frame.height};
  });
})"""
CONTRAST = """(() => {
  const bright = colour => {
    const parts = colour.match(/[\\d.]+/g).slice(0, 3).map(v => v / 255);
    const [r, g, b] = parts.map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const page = bright(getComputedStyle(document.body).backgroundColor);
  const marks = ['.lead', 'h1', 'td', 'figcaption', '.yes .status', 'p.facts', 'summary'];
  return marks.map(name => {
    const ink = bright(getComputedStyle(document.querySelector(name)).color);
    return (Math.max(ink, page) + 0.05) / (Math.min(ink, page) + 0.05);
  });
})()"""


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("name", ["whole", "sides", "bare"])
def test_the_page_fits(browser, pages, name, width):
    browser.open(pages[name], width)
    assert browser.requests() == [pages[name].as_uri()] and browser.complaints() == []
    assert browser.evaluate("innerWidth") == width
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    beyond = "[...document.querySelectorAll('main *')].filter(e => !e.closest('.scroll, pre, svg') && "
    beyond += "e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 80))"
    assert browser.evaluate(beyond) == []
    picture = browser.screenshot()
    assert picture.format == "PNG" and picture.width == width
    colours = picture.convert("L").histogram()
    assert sum(colours[200:]) > 0.5 * picture.width * picture.height and sum(colours[:100]) > 1000  # ink on paper


@pytest.mark.parametrize("width", [390, 760, 1280])
@pytest.mark.parametrize("name", ["whole", "sides"])
def test_charts_can_be_read(browser, pages, name, width):
    """Their text is large enough, within the picture, and nothing is printed over anything."""
    browser.open(pages[name], width)
    texts = browser.evaluate(TEXTS)
    assert len(texts) > 200
    assert [text["words"] for text in texts if text["size"] < 9] == []
    outside = [text["words"] for text in texts if text["left"] < -1 or text["right"] > text["width"] + 1]
    assert outside + [text["words"] for text in texts if text["top"] < -2 or text["bottom"] > text["height"] + 2] == []
    clashes = [
        (a["words"], b["words"])
        for a, b in itertools.combinations(texts, 2)
        if a["number"] == b["number"]
        and min(a["right"], b["right"]) - max(a["left"], b["left"]) > 1
        and min(a["bottom"], b["bottom"]) - max(a["top"], b["top"]) > 4
    ]
    assert clashes == []


def test_light_and_dark_have_contrast(browser, pages):
    grounds = []
    for dark in (False, True):
        browser.open(pages["whole"], 1280, dark=dark)
        assert min(browser.evaluate(CONTRAST)) >= 4.5
        grounds.append(browser.screenshot().convert("L").getpixel((5, 5)))
    assert grounds[0] > 230 and grounds[1] < 50


def test_paper_is_light_and_holds_everything(browser, pages):
    browser.open(pages["whole"], 794, dark=True, media="print")
    assert browser.screenshot().convert("L").getpixel((5, 5)) > 230
    assert browser.evaluate("getComputedStyle(document.querySelector('nav')).display") == "none"
    assert browser.evaluate("document.documentElement.scrollWidth") <= 794
    pdf = browser.pdf()
    assert pdf.startswith(b"%PDF") and 4 <= len(re.findall(rb"/Type\s*/Page\b", pdf)) <= 30


def test_a_keyboard_reaches_what_scrolls(browser, pages):
    browser.open(pages["whole"], 390)
    script = "[...document.querySelectorAll('.scroll, pre')].filter(e => e.tabIndex !== 0).length"
    assert browser.evaluate(script) == 0
    assert browser.evaluate("document.querySelectorAll('.scroll').length") > 10
