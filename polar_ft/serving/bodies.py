"""From the bytes of a request to its validated form, with bounds on time and memory.

JSON is bounded before Python objects are made of it: a byte of ``[[],[],…]`` takes a hundred in memory. Then
the number of candidates is checked, and only then is the value validated, which ends after a few faults. All
this runs in threads, not in the event loop.
"""

from __future__ import annotations

import json
from typing import Any, TypeVar

import numpy as np
from fastapi import HTTPException
from pydantic import TypeAdapter, ValidationError

from polar_ft.errors import validation_sentences
from polar_ft.serving.limits import MAX_CANDIDATES, Limits
from polar_ft.serving.wire import MOST_FAULTS, Faults

T = TypeVar("T")

# A smaller body cannot have too many values.
SMALL_BODY = 2**16

# Lists and objects in a body: for each candidate a list of messages, and what is around them.
MAX_CONTAINERS = 16 * MAX_CANDIDATES

# Names that pydantic puts into paths for the arms of a union.
_ARMS = {"one", "several", "string", "messages", "texts", "ids", "ids of several"}


def read_body(body: bytes, content_type: str, form: TypeAdapter[T], limits: Limits) -> T:
    """Reads and validates the body of a request.

    Args:
        body: The bytes.
        content_type: Its header; empty if there was none.
        form: What the body must be.
        limits: Limits of a request.

    Raises:
        HTTPException: It is not JSON or has another form (422), has too many values (413), or its content
            type is another one (415).
    """
    kind = content_type.partition(";")[0].strip().lower()
    if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
        # Web pages of other sites may send text and forms without being asked, so these are refused.
        given = "has no content type" if not kind else "has another content type"
        raise HTTPException(
            415, f"the request {given}: send JSON with the header 'Content-Type: application/json'"
        )
    if len(body) > SMALL_BODY:
        values, containers = count_values(body)
        if values > limits.max_request_tokens + 8 * MAX_CANDIDATES or containers > MAX_CONTAINERS:
            raise HTTPException(
                413, f"the body has {values} values, {containers} of them lists; send fewer inputs at once"
            )
    try:
        value = json.loads(body)
    except json.JSONDecodeError as error:
        raise HTTPException(422, f"body: is not valid JSON: {error.msg} (character {error.pos})") from None
    except (ValueError, RecursionError):
        raise HTTPException(422, "body: is not valid JSON") from None
    check_number(_candidates(value))
    try:
        return form.validate_python(value, context=Faults())
    except ValidationError as error:
        raise HTTPException(422, _faults(error)) from None


def check_number(candidates: int) -> None:
    """Checks the number of candidates of a request.

    Raises:
        HTTPException: It has too many.
    """
    if candidates > MAX_CANDIDATES:
        raise HTTPException(
            413, f"the request has {candidates} candidates; send at most {MAX_CANDIDATES} at once"
        )


def count_values(body: bytes) -> tuple[int, int]:
    r"""Counts the values of a JSON text, at most, and the lists and objects among them, without reading it.

    >>> count_values(b'{"text": ["a [, b", "c \\" ["], "n": [[1, 2], []]}')
    (10, 5)
    """
    # Without escaped quotes, what follows an odd number of quotes is inside a string.
    plain = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    characters = np.frombuffer(plain, dtype=np.uint8)
    inside = np.bitwise_xor.accumulate((characters == ord('"')).view(np.uint8)).view(np.bool_)
    outside = characters[~inside]
    containers = int(np.count_nonzero((outside == ord("[")) | (outside == ord("{"))))
    return int(np.count_nonzero(outside == ord(","))) + containers + 1, containers


def _candidates(value: Any) -> int:
    """The number of candidates of a body that is not validated yet; 0 where it does not say."""
    if not isinstance(value, dict):
        return 0
    if isinstance(value.get("inputs"), list):
        inputs = value["inputs"]
        lengths = (_length(one.get("candidates")) for one in inputs if isinstance(one, dict))
        return max(len(inputs), sum(lengths))
    return max(_length(value.get(key)) for key in ("candidates", "text", "input_ids", "input"))


def _length(value: Any) -> int:
    """Number of items of a list of sequences; the ids of a single one are not counted."""
    return len(value) if isinstance(value, list) and value and not isinstance(value[0], int) else 0


def _faults(error: ValidationError) -> str:
    """The first wrong fields and the reasons, without the values that the client sent."""
    reasons = [
        (sentence if ": " in sentence else f"body: {sentence}")[:300]  # names of fields are the client's
        for sentence in validation_sentences(error, leave_out=_ARMS)
    ]
    more = " (and more)" if len(reasons) > MOST_FAULTS else ""
    return "; ".join(reasons[:MOST_FAULTS]) + more
