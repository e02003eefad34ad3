"""Requests and answers: the server's own format and those of SGLang, vLLM and LMDeploy.

Those of RL frameworks are in `polar_ft.serving.rollouts`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    StrictInt,
    Tag,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)
from pydantic_core import PydanticOmit

from polar_ft.data.records import Message, PlainText, Text, text_of
from polar_ft.groups import FieldLengths, TextGroup, Wrapper

# Faults that an error lists; after so many wrong items the others of a list are not validated.
MOST_FAULTS = 10

# Messages of a dialogue, and fields of an object.
_MAX_MESSAGES = 1024
_MAX_FIELDS = 32


@dataclass
class Faults:
    """Context of a validation: how many items of lists were found wrong."""

    count: int = 0


def _few_faults(value: Any, validate: ValidatorFunctionWrapHandler, info: ValidationInfo) -> Any:
    # A list of a hundred thousand wrong items would take seconds, and gigabytes for their errors.
    faults: Faults = info.context or Faults()
    if faults.count > MOST_FAULTS:
        raise PydanticOmit
    try:
        return validate(value)
    except ValidationError:
        faults.count += 1
        raise


def _few_messages(value: Any, validate: ValidatorFunctionWrapHandler) -> Any:
    if isinstance(value, list) and len(value) > _MAX_MESSAGES:
        raise ValueError(f"has {len(value)} messages, more than {_MAX_MESSAGES}")
    return validate(value)


Item = TypeVar("Item")

# A list of which the first faults are listed.
Listed = list[Annotated[Item, WrapValidator(_few_faults)]]

ShortText = Annotated[Text, WrapValidator(_few_messages)]

Combine = Literal["max", "mean"]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _has_few_fields(cls, value: Any) -> Any:
        if isinstance(value, dict) and len(value) > _MAX_FIELDS:
            raise ValueError(f"has {len(value)} fields, more than {_MAX_FIELDS}")
        return value


class Lenient(BaseModel):
    """A body in another program's format: fields that it may have besides are ignored."""

    model_config = ConfigDict(strict=True, extra="ignore")


# ---- the server's own: POST /v1/rewards


class RewardInput(_Strict):
    """Candidates of one (prompt, reference) as texts; the server applies the template."""

    prompt: ShortText
    reference: ShortText | None = Field(default=None, description="May be empty.")
    references: Listed[ShortText] | None = Field(
        default=None, min_length=1, description="Several, instead of one."
    )
    candidates: Listed[ShortText] = Field(min_length=1)
    combine: Combine = Field(
        default="max",
        description="With several references the reward of a candidate is the greatest of those against each "
        "of them, or their mean.",
    )
    wrapper: Wrapper = Field(
        default="sft", description='How prompt and response are joined: "sft" with a line break.'
    )

    @model_validator(mode="after")
    def _has_references(self) -> RewardInput:
        if (self.reference is None) == (self.references is None):
            raise ValueError('must have either "reference" or "references"')
        return self

    def group(self) -> TextGroup:
        """Makes the text group of the input."""
        return TextGroup(
            prompt=text_of(self.prompt),
            references=texts_of_references(self.reference, self.references),
            candidates=tuple(map(text_of, self.candidates)),
            wrapper=self.wrapper,
        )


def texts_of_references(
    reference: str | list[Message] | None, references: Sequence[str | list[Message]] | None
) -> tuple[str, ...]:
    """The texts of several references, or else of the one.

    >>> texts_of_references("4", None), texts_of_references(None, ["4", "IV"])
    (('4',), ('4', 'IV'))
    """
    return tuple(map(text_of, references or ([] if reference is None else [reference])))


class _Asked(_Strict):
    model: PlainText | None = Field(default=None, description="Ignored, as there is one model.")
    scale: bool = Field(
        default=False,
        description="Return (reward - centre) / spread as rewards, as measured by polar-ft calibrate.",
    )


class RewardRequest(RewardInput, _Asked):
    """One (prompt, reference)."""


class RewardsRequest(_Asked):
    """Several (prompt, reference)."""

    inputs: Listed[RewardInput] = Field(min_length=1)


def _rewards_form(value: Any) -> str:
    several = "inputs" in value if isinstance(value, dict) else isinstance(value, RewardsRequest)
    return "several" if several else "one"


AnyRewardRequest = Annotated[
    Annotated[RewardRequest, Tag("one")] | Annotated[RewardsRequest, Tag("several")],
    Discriminator(_rewards_form),
]


class CutTokens(BaseModel):
    """Tokens that were cut off each field, as training cuts them; 0 where it was not cut.

    Of several references, the most that was cut with any of them.
    """

    prompt: int
    reference: int
    candidates: list[int]

    @classmethod
    def of(cls, cuts: Sequence[FieldLengths]) -> CutTokens:
        """Makes the answer's form of what a template cut with each reference."""
        return cls(
            prompt=max(cut.prompt for cut in cuts),
            reference=max(cut.reference for cut in cuts),
            candidates=[max(column) for column in zip(*(cut.candidates for cut in cuts), strict=True)],
        )


class Usage(BaseModel):
    """Tokens of all sequences; shared tokens are counted for each of them."""

    tokens: int


class RewardResponse(BaseModel):
    """Rewards in the order of the candidates.

    Attributes:
        model: Name of the model.
        rewards: Raw rewards, or on the measured scale if the request asks for it.
        raw: Raw rewards.
        tempered: Raw rewards divided by the measured temperature, so that their differences are log-odds of
            being preferred; null if none was measured.
        cut: What was cut.
        usage: Tokens.
    """

    model: str
    rewards: list[float]
    raw: list[float]
    tempered: list[float] | None
    cut: CutTokens
    usage: Usage


class RewardsResponse(BaseModel):
    """Rewards in the order of the inputs and of their candidates; see `RewardResponse`."""

    model: str
    rewards: list[list[float]]
    raw: list[list[float]]
    tempered: list[list[float]] | None
    cut: list[CutTokens]
    usage: Usage


# ---- the engines


def _input_form(value: Any) -> str | None:
    if isinstance(value, str):
        return "text"
    first = value[0] if isinstance(value, list) and value else None
    if isinstance(first, str):
        return "texts"
    if isinstance(first, list):
        return "ids of several"
    return "ids" if isinstance(first, int) else None


_TextArm = Annotated[PlainText, Tag("text")]
# Of wrong ids only the first is named.
_Ids = Annotated[list[StrictInt], Field(fail_fast=True)]
_TextsArm = Annotated[Listed[PlainText], Tag("texts")]
_IdsArm = Annotated[_Ids, Tag("ids")]
_SeveralArm = Annotated[Listed[_Ids], Tag("ids of several")]


def _form(must_be: str) -> Discriminator:
    """Chooses the arm of a union by the first element of a value, so that errors are only of that arm."""
    return Discriminator(
        _input_form, custom_error_type="input_form", custom_error_message=f"must be {must_be}"
    )


class ClassifyRequest(Lenient):
    """A request in SGLang's format: either ``text`` or ``input_ids``."""

    text: Annotated[_TextArm | _TextsArm, _form("a text or a list of texts")] | None = None
    input_ids: Annotated[_IdsArm | _SeveralArm, _form("token ids or a list of those")] | None = None

    @model_validator(mode="after")
    def _has_one(self) -> ClassifyRequest:
        if (self.text is None) == (self.input_ids is None):
            raise ValueError('must have either "text" or "input_ids"')
        return self

    @property
    def input(self) -> Any:
        """The input to score, in one of the four forms."""
        return self.text if self.text is not None else self.input_ids


class ClassifyMeta(BaseModel):
    """What SGLang reports for a sequence."""

    prompt_tokens: int


class ClassifyResult(BaseModel):
    """One reward in SGLang's format."""

    embedding: list[float]
    meta_info: ClassifyMeta


class ScoreRequest(Lenient):
    """A request in the format of SGLang's score API, as it takes it for reward models."""

    query: Annotated[_TextArm | _IdsArm, _form("a text or token ids")] = Field(
        description="What all sequences begin with: the prompt, the reference, the separator, and the prompt."
    )
    items: Annotated[
        _TextArm | _TextsArm | _SeveralArm, _form("a text, a list of texts or a list of token ids")
    ] = Field(description="The rest of each sequence: a candidate and the reward token.")
    label_token_ids: Listed[StrictInt] | None = Field(default=None, description="Ignored.")
    apply_softmax: Literal[False] = Field(
        default=False, description="Not supported: over one reward it is 1 whatever the item."
    )
    item_first: Literal[False] = Field(
        default=False, description="Not supported: what all sequences share comes first."
    )

    @model_validator(mode="after")
    def _are_of_one_kind(self) -> ScoreRequest:
        if isinstance(self.query, str) != isinstance(self.listed_items[0], str):
            raise ValueError("query and items must both be texts, or both token ids")
        return self

    @property
    def listed_items(self) -> list[Any]:
        """The items as a list."""
        return [self.items] if isinstance(self.items, str) else self.items


class ScoreUsage(BaseModel):
    """Tokens, as SGLang counts them."""

    prompt_tokens: int
    total_tokens: int
    completion_tokens: int = 0


class ScoreResponse(BaseModel):
    """The answer of SGLang's score API for reward models: one number in the list of each item."""

    scores: list[list[float]]
    model: str
    usage: ScoreUsage
    object: Literal["scoring"] = "scoring"


class PoolingRequest(Lenient):
    """A request in the format of vLLM and LMDeploy."""

    input: Annotated[
        _TextArm | _TextsArm | _IdsArm | _SeveralArm,
        _form("a text, a list of texts, token ids or a list of those"),
    ]
    use_activation: bool | None = Field(
        default=None,
        description="Of vLLM: true returns sigmoid(reward); false, or if omitted, the reward itself.",
    )
    encoding_format: Literal["float"] = "float"
    truncate_prompt_tokens: None = Field(default=None, description="Not supported: inputs are not truncated.")


class PoolingUsage(BaseModel):
    """Tokens, as vLLM counts them."""

    prompt_tokens: int
    total_tokens: int


class VllmPooling(BaseModel):
    """One input in vLLM's format: a row for each pooled token, which is only the last."""

    index: int
    object: Literal["pooling"] = "pooling"
    data: list[list[float]]


class LmdeployPooling(BaseModel):
    """One input in LMDeploy's format: the reward."""

    index: int
    object: Literal["pooling"] = "pooling"
    data: float


class PoolingResponse(BaseModel):
    """The answer of both engines, which differ in ``data[i].data``."""

    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[VllmPooling] | list[LmdeployPooling]
    usage: PoolingUsage


# ---- all


class ScaleCard(BaseModel):
    """The reward scale of the model, as polar-ft calibrate measured it; see `polar_ft.reward_scale`."""

    centre: float
    spread: float
    temperature: float | None
    quantiles: dict[str, float]


class ModelCard(BaseModel):
    """The model that is served.

    Attributes:
        root: From where the model was loaded, as vLLM and SGLang give it; None if not from a folder.
        version: Version of polar_ft.
        max_model_len: Limit of a sequence in tokens.
        max_response_length: Limit in tokens to which references and candidates of /v1/rewards are cut.
        template: Fingerprint of tokenizer, control tokens and limits.
        has_scale: Whether the model has a reward scale of polar-ft calibrate.
        scale: That scale.
    """

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["polar_ft"] = "polar_ft"
    root: str | None = None
    version: str
    max_model_len: int
    max_response_length: int
    vocab_size: int
    dtype: str
    device: str
    template: str
    has_scale: bool
    scale: ScaleCard | None = None


class ModelList(BaseModel):
    """The list of models, as OpenAI and vLLM return it."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class Status(BaseModel):
    """The answer of /health and /ready."""

    status: str


class ErrorBody(BaseModel):
    """What is wrong, and what to do."""

    message: str
    type: str
    code: int


class ErrorResponse(BaseModel):
    """Every answer with a status other than 200."""

    error: ErrorBody
