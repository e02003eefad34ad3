"""What clients send becomes the ids of training, and no text becomes a control token."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polar_ft.serving.inputs import InputError, InputReader
from tests.encoding import encode, ids_of

SEPARATOR, REWARD = "<|reward|>", "[UNUSED_TOKEN_130]"


@pytest.fixture(scope="session")
def reader(scorer) -> InputReader:
    return InputReader(scorer.template, scorer.vocab_size)


def ids(candidate) -> list[int]:
    return candidate.ids.tolist()


def published(prompt: str, reference: str, output: str) -> str:
    """What the published client sends for short texts."""
    return f"{prompt}\n{reference}{SEPARATOR}{prompt}\n{output}{REWARD}"


plain = st.text(st.sampled_from("ab é国<|>[]_\n"), min_size=1, max_size=12)
hostile = st.lists(st.sampled_from([SEPARATOR, REWARD, "a", "\n", " "]), max_size=3).map("".join)


@settings(max_examples=100, deadline=None)
@given(prompt=plain, reference=plain, output=st.one_of(plain, hostile))
def test_published_texts_have_the_ids_of_the_template(reader, prompt, reference, output):
    if not output:
        output = "x"  # the published client writes a line break before an empty answer, the template does not
    (candidate,) = reader.from_texts([published(prompt, reference, output)])
    (expected,) = ids_of(encode(reader.template, prompt, reference, [output]))
    assert ids(candidate) == expected
    # One separator and one reward token, in their places.
    assert expected.count(reader.template.separator_id) == 1
    assert expected.index(reader.template.separator_id) == candidate.head_length - 1
    assert expected.count(reader.template.reward_token_id) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Hello", "does not end with"),
        (f"a{SEPARATOR}b", "does not end with"),
        (f"a{SEPARATOR}b{REWARD} ", "does not end with"),
        (f"Hello{REWARD}", "has no '<|reward|>'"),
        (published(f"Is {SEPARATOR} one?", "Yes", "No"), "more than once"),
        (published("Name one.", SEPARATOR, "No"), "more than once"),
        (published("a " * 200, "b", "c"), "more than the model's limit of 300"),
    ],
)
def test_texts_that_could_be_misread_are_refused(reader, text, message):
    with pytest.raises(InputError, match=message.replace("|", r"\|")) as refused:
        reader.from_texts([published("p", "r", "o"), text])
    assert "text 1" in str(refused.value)


def test_ids_are_taken_as_they_are(reader):
    sequences = ids_of(encode(reader.template, "What is it?", "Beijing.", ["No", "Yes", ""]))
    candidates = reader.from_ids(sequences)
    assert [ids(candidate) for candidate in candidates] == sequences
    # All three have one head, so that they are computed as a tree.
    assert len({candidate.head for candidate in candidates}) == 1
    assert candidates[0].ids[candidates[0].head_length - 1] == reader.template.separator_id


@pytest.mark.parametrize(
    ("given_ids", "message"),
    [
        ([], "no token ids"),
        ([5, 300, 299], "holds the id 300; the vocabulary has 0 to 299"),
        ([5, -1, 299], "holds the id -1"),
        ([2**70, 299], "holds the id 1180591620717411303424"),
        ([5, 6], "ends with id 6, not with 299"),
        ([5] * 300 + [299], "301 tokens, more than the model's limit of 300"),
    ],
)
def test_ids_that_cannot_be_scored_are_refused(reader, given_ids, message):
    assert reader.template.reward_token_id == 299
    with pytest.raises(InputError, match=message):
        reader.from_ids([given_ids])
