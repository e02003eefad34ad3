"""Rewards by comparing final answers, in processes that cannot hang a run."""

from __future__ import annotations

import sys
import threading
from unittest.mock import Mock

import pytest

from polar_ft.errors import PolarError
from polar_ft.groups import TextGroup
from polar_ft.rft import rules
from polar_ft.rft.reward import Sample, sample_of, sample_of_label
from polar_ft.rft.rules import MathRule, final_answer
from polar_ft.rft.watch import read_watch
from tests.rft.test_reward import expected

SOLUTION = r"Both halves are $\frac{1}{2}$ of it. So $x = \boxed{\frac{1}{2}}$."


@pytest.fixture(scope="module")
def rule():
    made = MathRule(processes=2)
    yield made
    made.close()


@pytest.mark.parametrize(
    ("reference", "answer", "verdict"),
    [
        (SOLUTION, r"It is \boxed{0.5}.", "right"),
        (SOLUTION, r"It is $\frac12$.", "right"),
        (SOLUTION, r"First \boxed{0.5}, no: \boxed{2}.", "wrong"),
        (SOLUTION, "I do not know.", "wrong"),
        ("72", "The answer is 72.", "right"),
        (r"\frac{3}{4}", r"\boxed{0.75}", "right"),
        (r"\boxed{\sqrt{2}}", r"\boxed{2^{1/2}}", "right"),
        ("It cannot be said.", r"\boxed{0.5}", "no gold"),
        ("", r"\boxed{0.5}", "no gold"),
    ],
)
def test_final_answers(rule, reference, answer, verdict):
    assert rule.check([reference], answer).result(60) == verdict


def test_several_references(rule):
    assert rule.check([r"\boxed{1}", r"\boxed{2}"], r"\boxed{2}").result(60) == "right"


def test_an_answer_that_takes_too_long_is_wrong_and_the_next_is_compared(rule):
    slow = MathRule(seconds=2, processes=1)
    try:
        assert slow.check(["1"], r"\boxed{9^{9^{9^{9}}}}").result(60) in ("failed", "wrong")
        assert slow.check(["1"], r"\boxed{1}").result(60) == "right"
    finally:
        slow.close()


def test_a_process_that_does_not_answer_is_ended(monkeypatch):
    monkeypatch.setattr(
        rules, "_PROGRAM", "import time; print('ready', flush=True); time.sleep(600)", raising=True
    )
    slow = MathRule(seconds=0.3, processes=1)
    try:
        asked = slow.check(["1"], "1")
        assert asked.result(60) == "failed"
    finally:
        slow.close()


def test_a_process_that_was_killed_while_it_had_nothing_to_do_costs_no_answer():
    rule = MathRule(processes=1)
    try:
        assert rule.check(["1"], r"\boxed{1}").result(60) == "right"
        (worker,) = rule._workers
        worker._process.kill()
        worker._process.wait()
        assert rule.check(["1"], r"\boxed{1}").result(60) == "right"
        assert len(rule._workers) == 1
        assert worker._process.stdin.closed
    finally:
        rule.close()


def test_a_verdict_is_never_that_of_another_answer(monkeypatch):
    rule = MathRule(processes=1)
    try:
        assert rule.check(["1"], r"\boxed{1}").result(60) == "right"
        with monkeypatch.context() as changed:
            changed.setattr(
                threading.Timer, "start", Mock(side_effect=RuntimeError("can't start new thread"))
            )
            with pytest.raises(RuntimeError):
                rule.check(["1"], r"\boxed{1}").result(60)
        assert rule.check(["1"], r"\boxed{2}").result(60) == "wrong"
    finally:
        rule.close()


def test_rules_after_close(serve, reward_from):
    reward = reward_from(serve(), rule_rewards=[3, -8])
    assert [one.raw for one in reward.score([math_sample(r"\boxed{0.5}")])] == [3]
    reward.close()
    assert [one.raw for one in reward.score([math_sample(r"\boxed{0.5}")])] == [3]


def test_a_process_that_does_not_start_is_an_error(monkeypatch):
    monkeypatch.setattr(rules, "_PROGRAM", "raise SystemExit(1)")
    broken = MathRule(processes=1)
    try:
        with pytest.raises(PolarError, match="does not start"):
            broken.check(["1"], "1").result(60)
    finally:
        broken.close()


def test_without_the_package_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(PolarError, match=r"pip install 'polar-ft\[math\]'"):
        MathRule()


def test_the_last_box_with_its_braces():
    assert final_answer(r"\boxed{1} then \boxed{\frac{1}{\sqrt{2}}}.") == r"\boxed{\frac{1}{\sqrt{2}}}"


def math_sample(output: str, reference: str = SOLUTION) -> Sample:
    return sample_of("Half of one?", [reference], output, rule="math")


def test_rows_that_ask_for_a_rule_get_it_row_by_row(serve, reward_from, template, tmp_path):
    server = serve()
    plain = TextGroup("Q?", ("r",), ("a",))
    reward = reward_from(server, rule_rewards=[3, -8], temperature=2, watch=tmp_path, watch_every=5)
    batch = [
        math_sample(r"<think>Hm, 2?</think>\boxed{0.5}"),
        plain,
        math_sample(r"\boxed{2}"),
        math_sample("<think>never ended"),
        math_sample("Half.", reference="It cannot be said."),
    ]
    right, by_model, wrong, floor, unread = reward.score(batch)
    assert (right.raw, right.score, right.verdict) == (3, 1.5, "right")
    assert (wrong.raw, wrong.score, wrong.verdict) == (-8, -4, "wrong")
    assert by_model.raw == pytest.approx(expected(template, plain))
    assert (floor.raw, floor.answered, floor.verdict) == (-20, False, None)
    # A reference without a final answer leaves it to the reward model, and is counted.
    other = TextGroup("Half of one?", ("It cannot be said.",), ("Half.",))
    assert unread.raw == pytest.approx(expected(template, other))
    assert unread.verdict == "no gold"
    assert len(server.scored) == 2
    rows = [one.as_row() for one in (right, by_model, wrong, floor, unread)]
    assert [row["by_rule"] for row in rows] == [1, 0, 1, 0, 0]
    assert [row["rule_right"] for row in rows] == [1, 0, 0, 0, 0]
    assert [row["rule_failed"] for row in rows] == [0, 0, 0, 0, 1]
    (line,) = read_watch(tmp_path)
    assert (line.by_rule, line.rule_right, line.rule_failed) == (0.4, 0.5, 0.2)


def test_single_calls_from_threads(serve, reward_from):
    reward = reward_from(serve(), rule_rewards=[3, -8])
    found: dict[int, float] = {}

    def ask(number: int) -> None:
        found[number] = reward.submit(math_sample(rf"\boxed{{{number}/4}}")).result(60).raw

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {0: -8, 1: -8, 2: 3, 3: -8}


def test_rule_rewards_have_to_be_measured_or_given(serve, reward_from):
    with pytest.raises(PolarError, match="rule_rewards="):
        reward_from(serve()).score([math_sample("1")])
    with pytest.raises(PolarError, match="above the floor -20"):
        reward_from(serve(), rule_rewards=[1, -30])
    with pytest.raises(PolarError, match=r"rule_rewards=\[1\]: must be two numbers"):
        reward_from(serve(), rule_rewards=[1])
    with pytest.raises(PolarError, match="rule_seconds=0: must be"):
        reward_from(serve(), rule_seconds=0)


def test_the_rule_of_a_row_reaches_the_sample():
    label = {"prompt": "Q?", "references": ["a"], "rule": "math"}
    assert sample_of_label(label, "a").rule == "math"
    assert sample_of("Q?", ["a"], "a", rule="").rule is None
    with pytest.raises(PolarError, match="rule: is 'maths'"):
        sample_of("Q?", ["a"], "a", rule="maths")
