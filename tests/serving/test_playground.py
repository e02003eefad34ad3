"""The page at /, driven in headless Chromium."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from urllib.parse import urlsplit

import pytest

from polar_ft.serving.app import create_app
from tests.serving.tiny import running

playwright = pytest.importorskip(
    "playwright.sync_api", reason="the page needs a browser: pip install playwright"
)
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="the page needs a browser: no Chromium on PATH")

KEY = "correct-horse"


@pytest.fixture(scope="module")
def browser() -> Iterator:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser) -> Iterator:
    """A page that fails the test where its script does."""
    page = browser.new_page()
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    yield page
    page.close()
    assert problems == []


@pytest.fixture(scope="module")
def address(scorer) -> Iterator[str]:
    with running(create_app(scorer, name="tiny")) as address:
        yield address


def ranking(page) -> list[tuple[str, float]]:
    items = page.locator("#ranking li")
    return [
        (item.locator(".text").inner_text(), float(item.locator(".reward").inner_text()))
        for item in items.all()
    ]


def test_candidates_are_ranked_by_keyboard_alone(page, address, scorer):
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(address)
    page.locator("#model", has_text="tiny").wait_for()
    page.locator("#prompt").focus()
    page.keyboard.press("Control+A")
    page.keyboard.type("Which city?")
    page.keyboard.press("Tab")
    page.keyboard.press("Control+A")
    page.keyboard.type("Beijing.")
    page.get_by_role("button", name="Add candidate").focus()
    page.keyboard.press("Enter")
    hostile = "<img src=x onerror=alert(1)> <|reward|>"
    page.keyboard.type(hostile)  # the new field has the focus
    page.keyboard.press("Control+Enter")
    page.wait_for_selector("#ranking li")

    texts = ["Beijing.", "The capital of China is Beijing.", "Shanghai.", hostile]
    rewards = scorer.score(
        [{"prompt": "Which city?", "reference": "Beijing.", "output": text} for text in texts]
    )
    expected = sorted(zip(texts, rewards, strict=True), key=lambda pair: -pair[1])
    shown = ranking(page)
    assert [text for text, _ in shown] == [text for text, _ in expected]
    assert [reward for _, reward in shown] == pytest.approx([reward for _, reward in expected], abs=1e-4)
    widths = [bar.evaluate("bar => bar.offsetWidth") for bar in page.locator(".bar").all()]
    assert widths == sorted(widths, reverse=True)
    assert widths[0] > widths[-1] > 0
    assert {urlsplit(url).netloc for url in asked} - {""} == {urlsplit(address).netloc}


def test_what_was_cut_and_what_is_wrong_is_said(page, address):
    page.goto(address)
    page.locator("#candidates textarea").first.fill("z" * 200)
    page.get_by_role("button", name="Score").click()
    page.wait_for_selector("#ranking li")
    # 200 letters and BOS, of which 80 are kept: see tests/serving/test_app.py.
    assert "121 tokens were cut off its end" in page.locator("#ranking").inner_text()
    page.route(
        "**/v1/rewards",
        lambda route: route.fulfill(
            status=429,
            headers={"Retry-After": "7"},
            json={"error": {"message": "the queue is full", "type": "overloaded", "code": 429}},
        ),
    )
    page.get_by_role("button", name="Score").click()
    page.wait_for_selector("#error:visible")
    assert page.locator("#error").inner_text() == "the queue is full (status 429; try again in 7 s)"
    page.unroute("**/v1/rewards")
    page.route("**/v1/rewards", lambda route: route.abort())
    page.get_by_role("button", name="Score").click()
    page.locator("#error", has_text="does not answer").wait_for()


def test_the_key_is_asked_for(page, scorer):
    with running(create_app(scorer, name="tiny", api_key=KEY)) as address:
        page.goto(address)
        page.wait_for_selector("#key:visible")
        assert page.locator("#error").inner_text() == "The server asks for an API key."
        page.locator("#key").fill("wrong")
        page.get_by_role("button", name="Score").click()
        page.locator("#error", has_text="does not know").wait_for()
        page.locator("#key").fill(KEY)
        page.get_by_role("button", name="Score").click()
        page.wait_for_selector("#ranking li")
        assert page.locator("#error").is_hidden()
        assert len(ranking(page)) == 3
        page.close()


def test_narrow_screens_need_no_sideways_scrolling(browser, address):
    page = browser.new_page(viewport={"width": 320, "height": 600})
    page.goto(address)
    page.locator("#candidates textarea").first.fill("longwordwithoutspaces" * 20)
    page.get_by_role("button", name="Score").click()
    page.wait_for_selector("#ranking li")
    assert page.evaluate("document.documentElement.scrollWidth") <= 320
    page.close()
