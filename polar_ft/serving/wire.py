"""Requests and answers: the server's own format and those of SGLang, vLLM and LMDeploy."""

from __future__ import annotations

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

from polar_ft.data.records import PlainText, Text, text_of
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
_Listed = list[Annotated[Item, WrapValidator(_few_faults)]]

_Text = Annotated[Text, WrapValidator(_few_messages)]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _has_few_fields(cls, value: Any) -> Any:
        if isinstance(value, dict) and len(value) > _MAX_FIELDS:
            raise ValueError(f"has {len(value)} fields, more than {_MAX_FIELDS}")
        return value


class _Engine(BaseModel):
    # Other fields that the engines have (model, user, priority, …) are accepted and ignored.
    model_config = ConfigDict(strict=True, extra="ignore")


# ---- the server's own: POST /v1/rewards


class RewardInput(_Strict):
    """Candidates of one (prompt, reference) as texts; the server applies the template."""

    prompt: _Text
    reference: _Text = Field(description="May be empty.")
    candidates: _Listed[_Text] = Field(min_length=1)
    wrapper: Wrapper = Field(
        default="sft", description='How prompt and response are joined: "sft" with a line break.'
    )

    def group(self) -> TextGroup:
        """Makes the text group of the input."""
        return TextGroup(
            prompt=text_of(self.prompt),
            references=(text_of(self.reference),),
            candidates=tuple(map(text_of, self.candidates)),
            wrapper=self.wrapper,
        )


class _Asked(_Strict):
    model: PlainText | None = Field(default=None, description="Ignored, as there is one model.")
    scale: bool = Field(
        default=False, description="Return (reward - centre) / spread, as measured by polar-ft calibrate."
    )


class RewardRequest(RewardInput, _Asked):
    """One (prompt, reference)."""


class RewardsRequest(_Asked):
    """Several (prompt, reference)."""

    inputs: _Listed[RewardInput] = Field(min_length=1)


def _rewards_form(value: Any) -> str:
    several = "inputs" in value if isinstance(value, dict) else isinstance(value, RewardsRequest)
    return "several" if several else "one"


AnyRewardRequest = Annotated[
    Annotated[RewardRequest, Tag("one")] | Annotated[RewardsRequest, Tag("several")],
    Discriminator(_rewards_form),
]


class CutTokens(BaseModel):
    """Tokens that were cut off each field, as training cuts them; 0 where it was not cut."""

    prompt: int
    reference: int
    candidates: list[int]

    @classmethod
    def of(cls, cut: FieldLengths) -> CutTokens:
        """Makes the answer's form of what a template cut."""
        return cls(prompt=cut.prompt, reference=cut.reference, candidates=list(cut.candidates))


class Usage(BaseModel):
    """Tokens of all sequences; shared tokens are counted for each of them."""

    tokens: int


class RewardResponse(BaseModel):
    """Rewards in the order of the candidates."""

    model: str
    rewards: list[float]
    cut: CutTokens
    usage: Usage


class RewardsResponse(BaseModel):
    """Rewards in the order of the inputs and of their candidates."""

    model: str
    rewards: list[list[float]]
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
_TextsArm = Annotated[_Listed[PlainText], Tag("texts")]
_IdsArm = Annotated[_Ids, Tag("ids")]
_SeveralArm = Annotated[_Listed[_Ids], Tag("ids of several")]


def _form(must_be: str) -> Discriminator:
    """Chooses the arm of a union by the first element of a value, so that errors are only of that arm."""
    return Discriminator(
        _input_form, custom_error_type="input_form", custom_error_message=f"must be {must_be}"
    )


class ClassifyRequest(_Engine):
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


class PoolingRequest(_Engine):
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
