"""The report of a fit, on a screen and on a phone, and the result on the model card."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from polar_ft.fit.choices import Choice
from polar_ft.fit.report import extend_card, write_report
from polar_ft.fit.verdict import Advice, Outcome, Point, Side
from tests.browser import chromium

HOSTILE = "<script>alert(1)</script> 数据集 \u202e" + "long_name_" * 12

OUTCOME = Outcome(
    status="failed",
    first="Worse than the base model: 61.0 % of the 245 held-out pairs right instead of 66.0 %.",
    more=["With 245 held-out pairs the accuracy is known to 55.0–67.0 %."],
    model=Side(name="the new model", accuracy=0.61, interval=(0.55, 0.67)),
    base=Side(name="the base model", accuracy=0.66, interval=(0.6, 0.72), difference=-0.05),
    rule=Side(name="taking the longer candidate", accuracy=0.6, difference=0.01),
    shuffled=0.6,
    n_pairs=245,
    n_prompts=141,
    needed_pairs=2205,
    needed_prompts=1269,
    curve=[
        Point(share=share, pairs=100, accuracy=accuracy, interval=(accuracy - 0.05, accuracy + 0.05))
        for share, accuracy in ((0.25, 0.5), (0.5, 0.55), (1.0, 0.61))
    ],
    advice=[Advice(title="More data", text="It helps.")],
)
CHOICES = [
    Choice(name="lr", value=1e-5, reason="published for 1.8B"),
    Choice(name="lora", value={"r": 64, "alpha": 128, "dropout": 0.05, "load_in_4bit": True}, reason=HOSTILE),
]
VALIDATIONS = [
    {"step": step, "accuracy": a, "accuracy_low": a - 0.1, "accuracy_high": a + 0.1, "ties_half": half}
    for step, a, half in ((0, 0.0, 0.5), (5, 0.6, 0.6), (10, 0.61, 0.61))
]


@pytest.fixture
def page(tmp_path: Path) -> Path:
    file = tmp_path / "report.html"
    write_report(
        file,
        OUTCOME,
        CHOICES,
        title=f"my_rm: a reward model from {HOSTILE}",
        training={"validations": VALIDATIONS, "best_step": 10},
        facts=[("data", HOSTILE)],
        steps={"train": 12.3},
    )
    return file


def test_the_page_says_the_result_first_and_shows_no_markup_of_the_data(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert "<script" not in text
    assert text.index(OUTCOME.first) < text.index("More data") < text.index("published for 1.8B")
    assert "Learning curve" in text
    # A head of zeros ties all pairs before training, which is no accuracy of 0.
    assert "Validation accuracy from 60.0%" in text


def test_a_model_that_ties_everything_is_reported(tmp_path: Path) -> None:
    ties = [{"step": step, "accuracy": 0.0, "ties_half": 0.5} for step in (0, 5)]
    training = {"validations": ties, "best_step": None}
    file = tmp_path / "report.html"
    write_report(file, OUTCOME, CHOICES, title="my_rm", training=training, facts=[], steps={})
    assert "Validation during training" not in file.read_text(encoding="utf-8")


def test_a_card_has_one_result(tmp_path: Path) -> None:
    card = tmp_path / "README.md"
    card.write_text("# my_rm\n")
    for _ in range(2):
        extend_card(card, OUTCOME, CHOICES)
    text = card.read_text()
    assert text.startswith("# my_rm\n")
    assert text.count("## Result") == text.count(OUTCOME.first) == 1
    assert "| the base model | 66.0 % | 60.0–72.0 |" in text


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as browser:
        yield browser


def test_the_page_in_a_browser(browser: Any, page: Path) -> None:
    for width, scheme in ((1280, "light"), (1280, "dark"), (360, "light")):
        tab = browser.new_page(viewport={"width": width, "height": 844}, color_scheme=scheme)
        said: list[str] = []
        asked: list[str] = []
        tab.on("console", lambda message, said=said: said.append(message.text))
        tab.on("request", lambda request, asked=asked: asked.append(request.url))
        tab.goto(page.as_uri())
        assert (said, asked) == ([], [page.as_uri()])
        # Nothing has to be scrolled sideways, and the result is there without scrolling.
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        box = tab.locator(".verdict").bounding_box()
        assert box["y"] + box["height"] < 844
        assert tab.locator("figure svg").count() == 3
        for colour in ("backgroundColor", "color"):
            shade = tab.evaluate(f"getComputedStyle(document.body).{colour}")
            bright = sum(int(part) for part in shade.strip("rgba()").split(",")[:3]) > 380
            assert bright == ((scheme == "light") == (colour == "backgroundColor"))
        tab.close()
