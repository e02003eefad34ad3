"""Progress of a scoring run: a bar on a terminal, a line every so often in a log file."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from polar_ft.data.records import Example
from polar_ft.evaluation.evaluator import OnChunk

# Between two lines where there is no terminal to draw a bar on.
SECONDS_BETWEEN_LINES = 30.0


@contextmanager
def scoring_progress(
    label: str,
    examples: Sequence[Example],
    console: Console,
    *,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[OnChunk]:
    """Shows pairs, pairs/s and time left while the body runs.

    The time left goes by characters, not by pairs: the longest examples are scored first, so that pairs get
    faster towards the end.

    Args:
        label: What is being done.
        examples: All that will be done.
        console: Where to, as a rule stderr.
        clock: Seconds that only go forward; for tests.

    Yields:
        The function to call with the examples of each chunk that is done.
    """
    n_pairs = sum(len(example.pairs) for example in examples)
    n_chars = max(1, sum(example.characters for example in examples))
    done_pairs = done_chars = 0
    start = last_line = clock()
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %  {task.fields[state]}"),
        console=console,
        disable=not console.is_terminal,
    )
    with bar:
        task = bar.add_task(label, total=n_chars, state=progress_text(0, n_pairs, 0.0, 0.0))

        def on_chunk(chunk: Sequence[Example]) -> None:
            nonlocal done_pairs, done_chars, last_line
            done_pairs += sum(len(example.pairs) for example in chunk)
            done_chars += sum(example.characters for example in chunk)
            now = clock()
            state = progress_text(done_pairs, n_pairs, now - start, done_chars / n_chars)
            bar.update(task, completed=done_chars, state=state)
            finished = done_pairs == n_pairs
            if not console.is_terminal and (finished or now - last_line >= SECONDS_BETWEEN_LINES):
                console.print(f"{label}: {state}", highlight=False, soft_wrap=True)
                last_line = now

        yield on_chunk


def progress_text(done_pairs: int, n_pairs: int, seconds: float, share: float) -> str:
    """How far a run is: pairs done, their rate, time left.

    Args:
        done_pairs: Pairs done.
        n_pairs: All pairs.
        seconds: Time since the start.
        share: Share of the work that is done, 0 to 1.

    200 pairs in 50 s are 4 pairs/s; a quarter of the work took 50 s, so three quarters take 150 s:

    >>> progress_text(200, 1000, seconds=50, share=0.25)
    '200/1000 pairs, 4.0 pairs/s, 0:02:30 left'
    >>> progress_text(1000, 1000, seconds=125, share=1.0)
    '1000/1000 pairs, 8.0 pairs/s, took 0:02:05'
    """
    text = f"{done_pairs}/{n_pairs} pairs"
    if done_pairs and seconds > 0:
        text += f", {done_pairs / seconds:.1f} pairs/s"
    if share >= 1:
        return f"{text}, took {_clock_time(seconds)}"
    if share > 0:
        text += f", {_clock_time(seconds * (1 - share) / share)} left"
    return text


def _clock_time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
