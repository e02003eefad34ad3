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

# Bytes of a body that are counted before it is looked whether they are too many already.
_COUNTED_AT_ONCE = 2**18

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
        values = limits.max_request_tokens + 8 * MAX_CANDIDATES
        if not has_at_most(body, values, MAX_CONTAINERS):
            raise HTTPException(
                413,
                f"the body has more than {values} values, or more than {MAX_CONTAINERS} lists and objects; "
                f"send fewer inputs at once",
            )
    try:
        value = json.loads(body)
    except json.JSONDecodeError as error:
        raise HTTPException(422, f"body: is not valid JSON: {error.msg} (character {error.pos})") from None
    except (ValueError, RecursionError):
        raise HTTPException(422, "body: is not valid JSON") from None
    if (candidates := _candidates(value)) > MAX_CANDIDATES:
        raise HTTPException(
            413, f"the request has {candidates} candidates; send at most {MAX_CANDIDATES} at once"
        )
    try:
        return form.validate_python(value, context=Faults())
    except ValidationError as error:
        raise HTTPException(422, _faults(error)) from None


def has_at_most(body: bytes, values: int, containers: int) -> bool:
    r"""Whether a JSON text has at most so many values, and lists and objects among them, without reading it.

    A value more may be counted for an empty list.

    >>> body = b'{"text": ["a [, b", "c \\" ["], "n": [[1, 2], []]}'  # 9 values in 5 lists and objects
    >>> has_at_most(body, 10, 5), has_at_most(body, 8, 5), has_at_most(body, 10, 4)
    (True, False, False)
    """
    opening = body.count(b"[") + body.count(b"{")  # in strings too
    if opening <= containers and opening + body.count(b",") < values:
        return True
    # Without escaped quotes, what follows an odd number of quotes is inside a string.
    plain = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    inside = np.zeros(1, dtype=np.uint8)
    n_values, n_containers = 1, 0
    for start in range(0, len(plain), _COUNTED_AT_ONCE):
        characters = np.frombuffer(plain[start : start + _COUNTED_AT_ONCE], dtype=np.uint8)
        inside = np.bitwise_xor.accumulate((characters == ord('"')).view(np.uint8)) ^ inside[-1]
        outside = characters[inside == 0]
        n_containers += int(np.count_nonzero((outside == ord("[")) | (outside == ord("{"))))
        n_values += int(np.count_nonzero(outside == ord(",")))
        if n_values + n_containers > values or n_containers > containers:
            return False
    return True


def _candidates(value: Any) -> int:
    """The number of sequences of a body that is not validated yet; 0 where it does not say.

    A candidate is scored against each of its references.

    >>> _candidates({"inputs": [{"candidates": ["a", "b"], "references": ["r", "s", "t"]}, {}]})
    7
    >>> [_candidates(body) for body in ({"text": ["a", "b"]}, {"input_ids": [5, 6]}, {"labels": [{}, 1]})]
    [2, 1, 2]
    """
    if not isinstance(value, dict):
        return 0
    # All forms are counted, whatever the route: a body may have the fields of several.
    of_inputs = [
        sum(map(_sequences, value[key])) for key in ("inputs", "labels") if isinstance(value.get(key), list)
    ]
    lists = [_length(value.get(key)) for key in ("text", "input_ids", "input", "items", "query")]
    return max(_sequences(value), _sequences(value.get("label")), *of_inputs, *lists)


def _sequences(value: Any) -> int:
    """Number of sequences of one input of /v1/rewards, or of one label."""
    if not isinstance(value, dict):
        return 1
    return max(1, _length(value.get("candidates"))) * max(1, _length(value.get("references")))


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
