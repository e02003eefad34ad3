"""The page in headless Chromium: by keyboard, undone, restarted, on a phone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.browser import chromium
from tests.labelling.conftest import ROWS, labelling, lines

HOSTILE = "<img src=x onerror=\"document.title='hacked'\"><b>bold</b> &amp; </script>"
CODE = "def f(x):\n\treturn x  # " + "a_very_long_name_without_a_break_" * 12
LONG = "\n".join(f"Line {number} of a long answer." for number in range(200))
# A folder for pictures of the page, to look at.
PICTURES = os.environ.get("POLAR_FT_PICTURES")


@pytest.fixture(scope="module")
def browser() -> Iterator:
    with chromium() as browser:
        yield browser


@pytest.fixture
def new_page(browser) -> Iterator:
    """Opens pages, each with a storage of its own, that fail the test where their script does."""
    pages, problems = [], []

    def open_page(address: str, name: str | None = None, **settings):
        page = browser.new_page(**settings)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(address)
        pages.append(page)
        if name is not None:
            page.keyboard.type(name)  # the field has the focus
            page.keyboard.press("Enter")
            page.locator("#choices").wait_for()
        return page

    yield open_page
    for page in pages:
        page.close()
    assert problems == []


def answers(page) -> list[str]:
    return [page.locator(f"#answer-{number}").inner_text() for number in (1, 2)]


def press(page, key: str, progress: str) -> None:
    page.keyboard.press(key)
    page.locator("#progress", has_text=progress).wait_for()


def picture(page, name: str) -> None:
    if PICTURES:
        page.screenshot(path=str(Path(PICTURES) / f"{name}.png"))


def test_by_keyboard_with_undo_and_a_restart_in_the_middle(open_store, folder, new_page):
    asked: list[str] = []
    with labelling(open_store()) as (address, _):
        page = new_page(address)
        page.on("request", lambda request: asked.append(request.url))
        page.keyboard.type("Alice")
        page.keyboard.press("Enter")
        page.locator("#progress", has_text="alice · 0 of 4").wait_for()
        assert page.locator("#reference").inner_text() == "Beijing."
        first, second = answers(page)
        press(page, "1", "1 of 4")
        press(page, "s", "2 of 4")
        press(page, "u", "1 of 4")
        press(page, "=", "2 of 4")
        page.keyboard.press("x")  # keys without a meaning do nothing
        page.keyboard.press("Control+1")
        press(page, "u", "1 of 4")
        press(page, "u", "0 of 4")
        assert answers(page) == [first, second]
        press(page, "2", "1 of 4")
        third_pair = answers(page)
    assert [(row["chosen"], row["rejected"]) for row in lines(folder / "alice.jsonl")] == [(second, first)]

    page.keyboard.press("1")
    page.locator("#error", has_text="does not answer").wait_for()
    assert len(lines(folder / "alice.jsonl")) == 1

    with labelling(open_store()) as (address, _):
        page = new_page(address, "ALICE")
        assert page.locator("#progress").inner_text() == "alice · 1 of 4"
        assert answers(page) == third_pair
        for number, key in enumerate("12=", start=2):
            press(page, key, f"{number} of 4")
        page.locator("#done").wait_for()
        page.keyboard.press("1")
        assert page.get_by_role("button", name="Answer 1").is_disabled()
        picture(page, "done")
    assert [row["decision"] for row in lines(folder / "alice.jsonl")] == ["right", "left", "right", "tie"]
    assert all(0 <= row["seconds"] < 60 for row in lines(folder / "alice.jsonl"))
    assert {urlsplit(url).netloc for url in asked} - {""} == {urlsplit(asked[0]).netloc}


def test_two_labellers_at_once_and_one_of_them_in_two_windows(open_store, folder, new_page):
    with labelling(open_store()) as (address, _):
        alice, bob, also_bob = (new_page(address, name) for name in ("alice", "bob", "bob"))
        press(alice, "1", "alice · 1 of 4")
        press(bob, "2", "bob · 1 of 4")
        press(alice, "2", "alice · 2 of 4")
        also_bob.keyboard.press("1")
        also_bob.locator("#error", has_text="another window").wait_for()
        assert also_bob.locator("#progress").inner_text() == "bob · 1 of 4"
        press(also_bob, "=", "bob · 2 of 4")
    assert [row["decision"] for row in lines(folder / "alice.jsonl")] == ["left", "right"]
    assert [row["decision"] for row in lines(folder / "bob.jsonl")] == ["right", "tie"]


def test_texts_are_shown_as_they_are(open_store, new_page):
    rows = [{"prompt": CODE, "reference": HOSTILE, "candidates": [HOSTILE, LONG]}]
    with labelling(open_store(rows)) as (address, _):
        page = new_page(address, "alice")
        assert page.locator("#prompt div").evaluate("box => box.textContent") == CODE
        assert page.locator("#reference").inner_text() == HOSTILE
        assert set(answers(page)) == {HOSTILE, LONG}
        assert page.title() == "Which answer is better?"
        assert page.locator("#task img, #task b").count() == 0
        # The long answer scrolls in its box, also by keyboard; the buttons stay where they are.
        box = page.locator(".answers .text[tabindex]")
        assert box.evaluate("box => box.scrollHeight > box.clientHeight")
        picture(page, "long")


def test_the_key_is_asked_for(open_store, new_page):
    with labelling(open_store(), api_key="correct-horse") as (address, _):
        page = new_page(address)
        page.locator("#name").fill("alice")
        page.keyboard.press("Enter")
        page.locator("#error", has_text="asks for a key").wait_for()
        page.locator("#key").fill("wrong")
        page.keyboard.press("Enter")
        page.locator("#error", has_text="does not know this key").wait_for()
        page.locator("#key").fill("correct-horse")
        page.keyboard.press("Enter")
        page.locator("#progress", has_text="0 of 4").wait_for()
        assert page.locator("#error").is_hidden()


def test_a_name_that_cannot_be_used_is_said(open_store, new_page):
    with labelling(open_store()) as (address, _):
        page = new_page(address)
        page.keyboard.type("no/name")
        page.keyboard.press("Enter")
        page.locator("#error", has_text="a name has 1 to 40 letters").wait_for()


@pytest.mark.parametrize(
    ("name", "width", "dark"),
    [("desktop", 1280, False), ("phone", 360, False), ("small", 320, True)],
)
def test_every_width_fits_and_can_be_read(open_store, folder, new_page, name, width, dark):
    prompt = [
        {"role": "user", "content": "How do I reverse a list in Python?"},
        {"role": "assistant", "content": "In place, or as a new list?"},
        {"role": "user", "content": "As a new list. " + "x" * 100},
    ]
    slow = "Loop over it:\n\n```python\nnew = []\nfor item in items:\n    new.insert(0, item)\n```\n\n"
    answers_given = ["Slice it with a negative step:\n\n```python\nnew = items[::-1]\n```", slow + CODE]
    rows = [{"prompt": prompt, "reference": "items[::-1]", "candidates": answers_given}, *ROWS]
    with labelling(open_store(rows)) as (address, _):
        page = new_page(
            address,
            "alice",
            viewport={"width": width, "height": 740},
            color_scheme="dark" if dark else "light",
            has_touch=width < 500,
        )
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        sizes = page.evaluate(
            "[...document.querySelectorAll('main *')].filter(e => e.offsetParent && e.textContent.trim())"
            ".map(e => parseFloat(getComputedStyle(e).fontSize))"
        )
        assert min(sizes) >= 14
        one, two = (page.locator(f"#answer-{number}").bounding_box() for number in (1, 2))
        stacked = width < 500
        assert (one["y"] + one["height"] <= two["y"]) == stacked
        assert (one["x"] == two["x"]) == stacked
        for button in page.locator("#choices button").all():
            box = button.bounding_box()
            assert box["height"] >= 44
            assert box["x"] >= 0
            assert box["x"] + box["width"] <= width
            assert box["y"] + box["height"] <= 740  # always in sight
        picture(page, name)
        if stacked:
            # The last answer can be read to its end above the buttons.
            page.evaluate("window.scrollTo(0, document.body.scrollHeight)")
            end = page.locator("#answer-2").bounding_box()
            assert end["y"] + end["height"] <= page.locator("#choices").bounding_box()["y"]
            picture(page, f"{name}_end")
        page.get_by_role("button", name="Answer 2").click()
        page.locator("#progress", has_text="1 of 5").wait_for()
    assert [row["decision"] for row in lines(folder / "alice.jsonl")] == ["right"]
