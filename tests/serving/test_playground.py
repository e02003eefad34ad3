"""The page at /, driven in headless Chromium."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from urllib.parse import urlsplit

import pytest

from polar_ft.reward_scale import RewardScale
from polar_ft.serving.app import create_app
from tests.browser import chromium
from tests.serving.tiny import running

KEY = "correct-horse"


@pytest.fixture(scope="module")
def browser() -> Iterator:
    with chromium() as browser:
        yield browser


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


def test_a_prompt_of_several_turns_is_scored_and_copied_as_curl(browser, address, scorer):
    context = browser.new_context(permissions=["clipboard-read", "clipboard-write"])
    page = context.new_page()
    page.goto(address)
    page.locator("#prompt").fill("Which city?")
    for text in ("In which country?", "China, don't you know?"):
        page.get_by_role("button", name="Add turn").click()
        page.keyboard.type(text)  # the new field has the focus
    roles = [select.input_value() for select in page.locator("#turns select").all()]
    assert roles == ["user", "assistant", "user"]
    page.get_by_role("button", name="Remove turn 2").click()
    page.get_by_label("Role of turn 2").select_option("system")
    page.get_by_role("button", name="Score").click()
    page.wait_for_selector("#ranking li")
    page.get_by_role("button", name="Copy as curl").click()
    page.locator("#copied", has_text="Copied").wait_for()
    command = page.evaluate("navigator.clipboard.readText()")
    shown = ranking(page)
    context.close()

    prompt = [
        {"role": "user", "content": "Which city?"},
        {"role": "system", "content": "China, don't you know?"},
    ]
    texts = ["Beijing.", "The capital of China is Beijing.", "Shanghai."]
    rewards = scorer.score([{"prompt": prompt, "reference": "Beijing.", "output": text} for text in texts])
    assert dict(shown) == pytest.approx(dict(zip(texts, rewards, strict=True)), abs=1e-4)
    # What a shell makes of the command is the same request.
    script = f"curl() {{ printf '%s\\0' \"$@\"; }}\n{command}"
    words = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout.split(
        "\0"
    )
    assert words[:-2] == [f"{address}/v1/rewards", "-H", "Content-Type: application/json", "-d"]
    assert json.loads(words[-2]) == {
        "prompt": prompt,
        "reference": "Beijing.",
        "candidates": texts,
        "wrapper": "sft",
    }


def test_what_a_reward_means_is_said(page, address, model_folder):
    page.goto(address)
    assert "has no zero and no unit" in page.locator("#meaning").inner_text()
    assert "higher by 1 is preferred in 73 %" in page.locator("#meaning").inner_text()
    quantiles = {"p05": -1e9, "p25": -1.0, "p75": 1e8, "p95": 1e9}
    scale = RewardScale(centre=1.0, spread=4.0, within_spread=1.0, temperature=2.0, quantiles=quantiles)
    file = scale.save(model_folder)
    try:
        page.goto(address)
        page.locator("#model", has_text="tiny").wait_for()
        meaning = page.locator("#meaning").inner_text()
        assert "0 is the mean" in meaning
        assert "(1.00), and 1 is one standard deviation above it (4.00)" in meaning
        assert "preferred in 62 % of the cases" in meaning  # 1 / (1 + exp(-1 / 2))
        page.get_by_role("button", name="Score").click()
        page.wait_for_selector("#ranking li")
    finally:
        file.unlink()
    for (_, reward), item in zip(ranking(page), page.locator("#ranking li").all(), strict=True):
        note = item.locator(".note").inner_text()
        scaled = (reward - 1) / 4
        assert note.startswith(
            f"{'−' if scaled < 0 else '+'}{abs(scaled):.2f} on the calibrated scale; above "
        )
        assert f"above {25 if reward >= -1 else 5} % of the measured rewards" in note
    assert "the first is preferred to it in" in page.locator("#ranking li").last.inner_text()


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [320, 390])
def test_a_phone_shows_everything_without_sideways_scrolling(browser, address, width, dark):
    page = browser.new_page(
        viewport={"width": width, "height": 800}, color_scheme="dark" if dark else "light"
    )
    page.goto(address)
    page.get_by_role("button", name="Add turn").click()
    page.locator("#candidates textarea").first.fill("longwordwithoutspaces" * 20)
    page.get_by_role("button", name="Score").click()
    page.wait_for_selector("#ranking li")
    page.get_by_role("button", name="Copy as curl").click()
    page.wait_for_selector("#command:visible")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    sizes = page.evaluate(
        "[...document.querySelectorAll('body *')].map(e => parseFloat(getComputedStyle(e).fontSize))"
    )
    assert min(sizes) >= 14
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (max(map(int, background[4:-1].split(","))) < 64) == dark
    page.close()
