"""`report.html` in headless Chromium: it opens offline, asks for nothing and can be read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from polar_ft.evaluation.report.worst import FieldText, PairTexts, worst_pairs
from polar_ft.evaluation.report.writing import write_report
from tests.browser import chromium

from .conftest import HOSTILE

ENGLISH = {
    "names": ["chat", "code", "safety/a rather long name of a subset that goes on and on"],
    "prompt": "Why is the sky blue? " * 40,
    "chosen": "Because air scatters blue light more than red.",
    "rejected": f"It mirrors the sea. {HOSTILE}" + "word " * 2000,
}
CHINESE = {
    "names": ["数学题", "文学创作与续写", HOSTILE],
    "prompt": "请写一首关于秋天的诗。\n要求：五言绝句。",
    "chosen": "空山新雨后，天气晚来秋。",
    "rejected": "秋天来了。" * 300 + " שלום مرحبا",
}


SIDEWAYS = """[...document.querySelectorAll("*")].filter(
    each => each.scrollWidth > each.clientWidth + 1 && getComputedStyle(each).overflowX != "visible"
).map(each => each.outerHTML.slice(0, 200))"""

# In pixels of the screen; a plot's texts shrink with it.
SMALLEST_TEXT = """Math.min(...[...document.querySelectorAll("body *")].filter(
    each => each.getBoundingClientRect().width
        && [...each.childNodes].some(child => child.nodeType == 3 && child.textContent.trim())
).map(each => {
    const size = parseFloat(getComputedStyle(each).fontSize), plot = each.closest("svg");
    return plot ? size * plot.getBoundingClientRect().width / plot.viewBox.baseVal.width : size;
}))"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as browser:
        yield browser


@pytest.mark.parametrize("language", [ENGLISH, CHINESE], ids=["english", "chinese"])
def test_page_in_a_browser(browser, make_run, tmp_path, language):
    report, table = make_run(language["names"])

    def whole(text):
        return FieldText(text, 0, len(text))

    cut = FieldText(language["rejected"], 0, 500)
    texts = PairTexts(whole(language["prompt"]), (whole(""),), whole(language["chosen"]), cut)
    paths = write_report(report, table, tmp_path, worst=worst_pairs(table, lambda row: texts))

    for width, scheme in ((1280, "light"), (1280, "dark"), (360, "light")):
        page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
        said, asked = [], []
        page.on("console", lambda message, said=said: said.append(message.text))
        page.on("pageerror", lambda error, said=said: said.append(str(error)))
        page.on("request", lambda request, asked=asked: asked.append(request.url))
        page.goto(paths[1].as_uri())
        assert said == []
        assert asked == [paths[1].as_uri()]
        for section in ("checks", "subsets", "margins", "length", "reference", "ranking", "run", "worst"):
            assert page.locator(f"#{section}").is_visible()
        # The page itself never scrolls sideways: wide tables scroll in their own box.
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        for box in (svg.bounding_box() for svg in page.locator("figure svg").all()):
            assert box["width"] > 0.7 * min(width, 560)
        paper, ink = page.evaluate(
            "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]"
        )
        assert (brightness(paper) > brightness(ink)) == (scheme == "light")
        page.close()

    page = browser.new_page(viewport={"width": 390, "height": 844}, color_scheme="dark")
    page.goto(paths[1].as_uri())
    # On a phone nothing has to be scrolled sideways, tables neither, and every text can be read.
    assert page.evaluate(SIDEWAYS) == []
    assert page.evaluate(SMALLEST_TEXT) >= 14
    # What matters stands first, before anything has to be scrolled.
    box = page.locator(".verdict").bounding_box()
    assert box["y"] + box["height"] < 500
    assert "the best rule without a model" in page.locator(".verdict").inner_text()
    page.close()

    page = browser.new_page()
    page.goto(paths[1].as_uri())
    assert page.locator("script").count() == 0
    for name in language["names"]:
        # innerText is what a reader sees; a name may be cut in a plot but not in its table.
        shown = name.replace("\u202e", "⟦U+202E⟧").replace("\x1b", "⟦U+001B⟧")
        assert shown in page.locator("#subsets table").first.inner_text()
    first = page.locator(".pair").first
    assert language["chosen"] in first.inner_text()
    hidden = first.locator("details.cut del")
    assert not hidden.is_visible()
    first.locator("details.cut summary").click()
    assert hidden.is_visible()
    assert hidden.inner_text().strip()[:5] in language["rejected"]
    page.close()


def brightness(colour: str) -> int:
    return sum(int(part) for part in colour.strip("rgba()").split(",")[:3])
