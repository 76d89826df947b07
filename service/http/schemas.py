"""Bodies of /generate and /generate_stream: LoRAX's and TGI's schema by its names, plus the rank."""

from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    StrictBool,
    WithJsonSchema,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from service.core import FinishReason, Mode
from service.http.error_table import KINDS
from service.http.not_served import NotServed
from service.rank.rank_policy import RankReason, RankWish
from service.slo import Slo

MAX_STOPS = 16
MAX_STOP_CHARACTERS = 256
DEFAULT_MAX_NEW_TOKENS = 20
MAX_BEST_OF = 16
MAX_ALTERNATIVES = 20
MAX_BIASED_TOKENS = 1024
MAX_STOP_TOKENS = 64
_MAX_FIELDS = 256
MIN_TEMPERATURE = 1e-4
"""Below it, logits divided by the temperature leave what float32 holds; 0 is greedy."""


def whole_text(text: str) -> str:
    """The text, if there is any. Raises ValueError."""
    if not text:
        raise ValueError("must not be empty")
    return encodable(text)


def encodable(text: str) -> str:
    """The text, unless it holds what JSON can say and no encoding can. Raises ValueError."""
    if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
        raise ValueError("holds half a surrogate pair, which is no text")
    return text


def checked_temperature(value: float | None) -> float | None:
    """A temperature that float32 can divide by. Raises ValueError."""
    if value is not None and 0 < value < MIN_TEMPERATURE:
        raise ValueError(f"must be 0 (greedy) or at least {MIN_TEMPERATURE}")
    return value


def given_or(value: float | None, neutral: float) -> float:
    """`value`, or what asks for nothing where it is null."""
    return neutral if value is None else value


def is_none(value: object) -> bool:
    """For fields that are left out where they say nothing."""
    return value is None


def rank_wish(value: object) -> object:
    """Check a rank as a client writes it in JSON."""
    if value in (None, "max", "auto") or (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
        return value
    raise ValueError('must be an integer of at least 1, "max" or "auto"')


def few_keys(most: int) -> BeforeValidator:
    """Counts a mapping's keys before any is looked at; `max_length` does it after, when each may have cost a finding."""

    def check(value: object) -> object:
        if isinstance(value, dict) and len(value) > most:
            raise ValueError(f"has {len(value)} keys; legal: up to {most}")
        return value

    return BeforeValidator(check)


class Body(BaseModel):
    """An object that clients send. A field that it does not have is refused; far too many are not even listed.

    Lists in it have few items or fail fast, so that no body costs more than a few hundred findings.
    """

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _has_few_fields(cls, value: object) -> object:
        if isinstance(value, dict) and len(value) > _MAX_FIELDS:
            raise ValueError(f"has {len(value)} fields; legal: up to {_MAX_FIELDS}")
        return value


class OrNull:
    """Metadata of a type whose validator takes null as well, so that the OpenAPI document says so."""

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {"anyOf": [handler(schema), {"type": "null"}]}


Text = Annotated[str, Field(strict=True, json_schema_extra={"minLength": 1}), AfterValidator(whole_text)]
PlainText = Annotated[str, Field(strict=True), AfterValidator(encodable)]
"""A text that may be empty."""
Name = Annotated[str, Field(strict=True, max_length=256)]
PositiveInt = Annotated[int, Field(strict=True, ge=1, le=2**31 - 1)]
Rank = Annotated[
    RankWish,
    BeforeValidator(rank_wish),
    WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 1}, {"enum": ["max", "auto"]}, {"type": "null"}]}),
]
Finite = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Milliseconds = Annotated[Finite, Field(gt=0, le=1e9)]
Stops = Annotated[
    list[Annotated[Text, Field(max_length=MAX_STOP_CHARACTERS)]],
    Field(max_length=MAX_STOPS),
    BeforeValidator(lambda value: [] if value is None else value),
    OrNull(),
]
Alternatives = Annotated[int, Field(strict=True, ge=0, le=MAX_ALTERNATIVES)]
Penalty = Annotated[Finite, Field(ge=-2, le=2)]
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
Biases = Annotated[
    dict[TokenId, Annotated[Finite, Field(ge=-100, le=100)]],
    Field(max_length=MAX_BIASED_TOKENS),
    few_keys(MAX_BIASED_TOKENS),
    BeforeValidator(lambda value: {} if value is None else value),
    OrNull(),
]
StopTokens = Annotated[
    list[Annotated[TokenId, Field(strict=True)]],
    Field(max_length=MAX_STOP_TOKENS),
    BeforeValidator(lambda value: [] if value is None else value),
    OrNull(),
]
Switch = Annotated[StrictBool, BeforeValidator(lambda value: False if value is None else value), OrNull()]
"""A boolean for which clients may send null."""
OnSwitch = Annotated[StrictBool, BeforeValidator(lambda value: True if value is None else value), OrNull()]
"""One that is on where they do."""
Temperature = Annotated[
    Finite,
    Field(ge=0, le=100),
    AfterValidator(checked_temperature),
    WithJsonSchema({"anyOf": [{"const": 0}, {"type": "number", "minimum": MIN_TEMPERATURE, "maximum": 100}]}),
]


class GenerateParameters(Body):
    """How to generate. Sampling is on with `do_sample`, or where temperature, top_k, top_p, min_p or typical_p is not neutral.

    Log-probabilities are the model's own: before penalties, bias, temperature and filters.
    """

    model_config = ConfigDict(frozen=True)

    adapter_id: Name | None = Field(None, description="Adapter; null or '' for the base. `name@8` also gives the rank.")
    adapter_source: Annotated[Any, NotServed("local", instead="adapters are uploaded with PUT /adapters/{id}")] = None
    rank: Rank = Field(None, description="Rank to serve at: an integer, 'max' or 'auto' (the server's policy).")
    rank_policy: Name | None = Field(None, description="Policy that chooses the rank, by its name in the server.")
    latency_slo_ms: Milliseconds | None = Field(None, description="Objective: from arrival to the last token.")
    ttft_slo_ms: Milliseconds | None = Field(None, description="Objective: from arrival to the first token.")
    itl_slo_ms: Milliseconds | None = Field(None, description="Objective: between two tokens, in the mean over the answer.")
    max_new_tokens: PositiveInt | None = Field(None, description="Most new tokens; 20 unless given.")
    do_sample: Switch = Field(False, description="Draw tokens instead of taking the most probable one.")
    temperature: Temperature | None = Field(None, description="Divides the logits; 0 is greedy.")
    top_k: PositiveInt | None = Field(None, description="Draw among this many most probable tokens.")
    top_p: Annotated[Finite, Field(gt=0, le=1)] | None = Field(
        None, description="Draw among the fewest tokens that have this probability together."
    )
    min_p: Annotated[Finite, Field(ge=0, le=1)] | None = Field(
        None, description="Draw among the tokens at least this fraction as probable as the most probable one; 0 is all."
    )
    typical_p: Annotated[Finite, Field(gt=0, le=1)] | None = Field(
        None, description="Draw among the tokens nearest the expected information that have this probability together."
    )
    repetition_penalty: Annotated[Finite, Field(gt=0, le=100)] | None = Field(
        None, description="Above 1, makes tokens of prompt and answer less probable: divides or multiplies their logits."
    )
    presence_penalty: Penalty | None = Field(None, description="Taken once from the logits of tokens in the answer.")
    frequency_penalty: Penalty | None = Field(
        None, description="Taken from the logits of tokens in the answer, once for each time that they occur."
    )
    logit_bias: Biases = Field(default_factory=dict, description="Token id to what is added to its logit, -100 to 100.")
    best_of: Annotated[int, Field(strict=True, ge=1, le=MAX_BEST_OF)] | None = Field(
        None,
        description="Draw this many answers and take the one with the highest mean log-probability of its tokens; the "
        "details have the others, each with its seed. Not for streams.",
    )
    seed: Annotated[int, Field(strict=True, ge=0, lt=2**64)] | None = Field(
        None, description="The same seed gives the same text; drawn at random unless given."
    )
    stop: Stops = Field(default_factory=list, description="Generation ends after any of these; it is kept in the text.")
    stop_token_ids: StopTokens = Field(default_factory=list, description="Generation ends after any of these tokens.")
    include_stop_str_in_output: OnSwitch = Field(
        True, description="Keep the stop text in the answer. If false, no part of it is told, in streams neither."
    )
    min_new_tokens: Annotated[int, Field(strict=True, ge=0, le=2**31 - 1)] | None = Field(
        None, description="Fewest new tokens: before them no end of sequence, stop token or stop text ends the generation."
    )
    ignore_eos_token: Switch = Field(False, description="Go on after the end-of-sequence token.")
    return_full_text: Switch = Field(False, description="Put the prompt before the generated text.")
    details: Switch = Field(False, description="Answer with tokens, their log probabilities and what served them.")
    decoder_input_details: Switch = Field(
        False, description="Tell the log-probabilities of the prompt's tokens, in the details. Not for streams."
    )
    top_n_tokens: Alternatives | None = Field(None, description="Tell this many most probable tokens at every place.")
    return_k_alternatives: Alternatives | None = Field(None, description="The same by LoRAX's name: told in each token.")
    truncate: PositiveInt | None = Field(None, description="Keep only this many last tokens of the prompt.")

    adapter_parameters: Annotated[Any, NotServed()] = None
    merged_adapters: Annotated[Any, NotServed()] = None
    api_token: Annotated[Any, NotServed()] = None
    apply_chat_template: Annotated[Any, NotServed(False)] = None
    grammar: Annotated[Any, NotServed()] = None
    response_format: Annotated[Any, NotServed()] = None
    watermark: Annotated[Any, NotServed(False)] = None

    @property
    def slo(self) -> Slo:
        """The objectives that the body names."""
        return Slo(self.latency_slo_ms, self.ttft_slo_ms, self.itl_slo_ms)

    @property
    def is_sampling(self) -> bool:
        """TGI's rule, with temperature 0 as the greedy limit."""
        if self.temperature == 0:
            return False
        return self.do_sample or any(
            (
                self.temperature not in (None, 1.0),
                self.top_k is not None,
                self.top_p not in (None, 1.0),
                self.min_p not in (None, 0.0),
                self.typical_p not in (None, 1.0),
            )
        )

    @property
    def wants_details(self) -> bool:
        """TGI's rule: to ask for the prompt's tokens is to ask for details."""
        return self.details or self.decoder_input_details


class GenerateRequest(Body):
    """A prompt and how to go on from it."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "inputs": "name[Blue Spice], eatType[coffee shop], area[city centre] =>",
                    "parameters": {"adapter_id": "mr-to-text", "rank": 8, "max_new_tokens": 64, "stop": ["\n"]},
                }
            ]
        },
    )

    inputs: Text = Field(description="The prompt.")
    parameters: Annotated[GenerateParameters, BeforeValidator(lambda value: {} if value is None else value), OrNull()] = Field(
        default_factory=lambda: GenerateParameters.model_validate({})
    )


class CompatRequest(GenerateRequest):
    """The body of POST /, where LoRAX's and Hugging Face's clients send both kinds of request."""

    stream: Switch = Field(False, description="Answer as /generate_stream does.")


class PrefillToken(BaseModel):
    """One token of the prompt."""

    id: int
    text: str
    logprob: float | None = Field(description="Null for the first token of the prompt.")


class AlternativeToken(BaseModel):
    """A token that could have been chosen, as LoRAX tells it."""

    id: int
    text: str
    logprob: float


class TokenOut(BaseModel):
    """One generated token."""

    id: int
    text: str
    logprob: float
    special: bool
    skipped: bool = Field(default=False, description="Always false; LoRAX's client wants the field.")
    alternative_tokens: list[AlternativeToken] | None = Field(
        default=None, exclude_if=is_none, description="With return_k_alternatives."
    )


class PredictedTimes(BaseModel):
    """Milliseconds that were predicted at the rank that serves, from arrival, without the safety margin."""

    ttft_ms: float
    itl_ms: float
    latency_ms: float


class SloOut(BaseModel):
    """The latency objectives that the request is measured by."""

    latency_slo_ms: float | None
    ttft_slo_ms: float | None
    itl_slo_ms: float | None
    met: bool | None = Field(description="Measured in the server, from the arrival of the request's headers.")


class Timing(BaseModel):
    """Milliseconds that the generation took, as the headers of a whole answer tell them; of several sequences, the longest."""

    queue_ms: float
    time_to_first_token_ms: float
    time_per_token_ms: float
    total_ms: float


class RankSegment(BaseModel):
    """Tokens of an answer that were made one after the other at one rank."""

    rank: int
    tokens: int


class ServedBy(BaseModel):
    """What served a request."""

    adapter_id: str | None
    adapter_version: str | None
    rank: int = Field(description="0 for the base model; where it was changed, that of the last token.")
    rank_segments: list[RankSegment] | None = Field(
        default=None,
        exclude_if=is_none,
        description="Where the rank was changed: the ranks in turn, first the one chosen, with 0 tokens if it made none.",
    )
    rank_reason: RankReason
    rank_policy: str | None
    predicted: PredictedTimes | None = Field(default=None, exclude_if=is_none, description="Where it could be predicted.")
    slo: SloOut | None = Field(default=None, exclude_if=is_none, description="Where there are objectives.")
    timing: Timing | None = Field(default=None, exclude_if=is_none, description="Known when all is generated.")
    mode: Mode


class StreamDetails(ServedBy):
    """What the generation took and what served it."""

    finish_reason: FinishReason
    prompt_tokens: int
    generated_tokens: int
    skipped_tokens: int = 0
    seed: int | None = Field(description="Null where nothing was drawn.")


class SequenceTokens(BaseModel):
    """Every token of a sequence."""

    prefill: list[PrefillToken] = Field(description="The prompt's tokens, with decoder_input_details.")
    tokens: list[TokenOut]
    top_tokens: list[list[TokenOut]] | None = Field(
        default=None, exclude_if=is_none, description="The most probable tokens in the place of each, with top_n_tokens."
    )


class BestOfSequence(SequenceTokens):
    """An answer that was not the best."""

    generated_text: str
    finish_reason: FinishReason
    generated_tokens: int
    seed: int = Field(description="Alone, with this seed, the same text.")


class Details(StreamDetails, SequenceTokens):
    """The same with every token."""

    best_of_sequences: list[BestOfSequence] | None = Field(
        default=None, exclude_if=is_none, description="The other answers, with best_of."
    )


class GenerateResponse(BaseModel):
    """The generated text."""

    generated_text: str
    details: Details | None = None


class StreamResponse(BaseModel):
    """One event of a stream; text and details come with the last."""

    token: TokenOut
    top_tokens: list[TokenOut] | None = Field(default=None, exclude_if=is_none, description="With top_n_tokens.")
    generated_text: str | None = None
    details: StreamDetails | None = None


class ErrorResponse(BaseModel):
    """TGI's error body."""

    error: str
    error_type: str = Field(description=f"One of {', '.join(sorted({kind.type for kind in KINDS}))}.")
