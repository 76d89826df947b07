"""Bodies of /generate and /generate_stream: LoRAX's and TGI's schema by its names, plus the rank."""

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, StrictBool, WithJsonSchema

from service.core import FinishReason, Mode
from service.http.not_served import LATENCY_INSTEAD, NotServed
from service.rank_policy import RankReason, RankWish

MAX_STOPS = 16
MAX_STOP_CHARACTERS = 256
DEFAULT_MAX_NEW_TOKENS = 20
MIN_TEMPERATURE = 1e-4
"""Below it, logits divided by the temperature leave what float32 holds; 0 is greedy."""


def _whole_text(text: str) -> str:
    if not text:
        raise ValueError("must not be empty")
    if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
        raise ValueError("holds half a surrogate pair, which is no text")
    return text


def _temperature(value: float | None) -> float | None:
    if value is not None and 0 < value < MIN_TEMPERATURE:
        raise ValueError(f"must be 0 (greedy) or at least {MIN_TEMPERATURE}")
    return value


def rank_wish(value: object) -> object:
    """Check a rank as a client writes it in JSON."""
    if value in (None, "max", "auto") or (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
        return value
    raise ValueError('legal: an integer of at least 1, "max", "auto"')


Text = Annotated[str, Field(strict=True), AfterValidator(_whole_text)]
Name = Annotated[str, Field(strict=True, max_length=256)]
PositiveInt = Annotated[int, Field(strict=True, ge=1, le=2**31 - 1)]
Rank = Annotated[
    RankWish,
    BeforeValidator(rank_wish),
    WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 1}, {"enum": ["max", "auto"]}, {"type": "null"}]}),
]
Finite = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Stops = Annotated[
    list[Annotated[Text, Field(max_length=MAX_STOP_CHARACTERS)]],
    Field(max_length=MAX_STOPS),
    BeforeValidator(lambda value: [] if value is None else value),
]
Switch = Annotated[StrictBool, BeforeValidator(lambda value: False if value is None else value)]
"""A boolean for which clients may send null."""


class GenerateParameters(BaseModel):
    """How to generate. Sampling is on with `do_sample`, or where temperature, top_k or top_p is not neutral."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    adapter_id: Name | None = Field(None, description="Adapter; null or '' for the base. `name@8` also gives the rank.")
    adapter_source: Annotated[Any, NotServed("local", instead="adapters are uploaded with PUT /adapters/{id}")] = None
    rank: Rank = Field(None, description="Rank to serve at: an integer, 'max' or 'auto' (the server's policy).")
    rank_policy: Name | None = Field(None, description="Policy that chooses the rank, by its name in the server.")
    max_new_tokens: PositiveInt | None = Field(None, description="Most new tokens; 20 unless given.")
    do_sample: Switch = Field(False, description="Draw tokens instead of taking the most probable one.")
    temperature: Annotated[Finite, Field(ge=0, le=100), AfterValidator(_temperature)] | None = Field(
        None, description="Divides the logits; 0 is greedy."
    )
    top_k: PositiveInt | None = Field(None, description="Draw among this many most probable tokens.")
    top_p: Annotated[Finite, Field(gt=0, le=1)] | None = Field(
        None, description="Draw among the fewest tokens that have this probability together."
    )
    seed: Annotated[int, Field(strict=True, ge=0, lt=2**64)] | None = Field(
        None, description="The same seed gives the same text; drawn at random unless given."
    )
    stop: Stops = Field(default_factory=list, description="Generation ends after any of these; it is kept in the text.")
    ignore_eos_token: Switch = Field(False, description="Go on after the end-of-sequence token.")
    return_full_text: Switch = Field(False, description="Put the prompt before the generated text.")
    details: Switch = Field(False, description="Answer with tokens, their log probabilities and what served them.")
    truncate: PositiveInt | None = Field(None, description="Keep only this many last tokens of the prompt.")

    latency_slo_ms: Annotated[Any, NotServed(instead=LATENCY_INSTEAD)] = None
    ttft_slo_ms: Annotated[Any, NotServed(instead=LATENCY_INSTEAD)] = None
    itl_slo_ms: Annotated[Any, NotServed(instead=LATENCY_INSTEAD)] = None
    adapter_parameters: Annotated[Any, NotServed()] = None
    merged_adapters: Annotated[Any, NotServed()] = None
    api_token: Annotated[Any, NotServed()] = None
    apply_chat_template: Annotated[Any, NotServed(False)] = None
    best_of: Annotated[Any, NotServed(1)] = None
    decoder_input_details: Annotated[Any, NotServed(False)] = None
    frequency_penalty: Annotated[Any, NotServed(0.0)] = None
    grammar: Annotated[Any, NotServed()] = None
    presence_penalty: Annotated[Any, NotServed(0.0)] = None
    repetition_penalty: Annotated[Any, NotServed(1.0)] = None
    response_format: Annotated[Any, NotServed()] = None
    return_k_alternatives: Annotated[Any, NotServed()] = None
    top_n_tokens: Annotated[Any, NotServed(0)] = None
    typical_p: Annotated[Any, NotServed(1.0)] = None
    watermark: Annotated[Any, NotServed(False)] = None

    @property
    def is_sampling(self) -> bool:
        """TGI's rule, with temperature 0 as the greedy limit."""
        if self.temperature == 0:
            return False
        return self.do_sample or any(
            (self.temperature not in (None, 1.0), self.top_k is not None, self.top_p not in (None, 1.0))
        )


class GenerateRequest(BaseModel):
    """A prompt and how to go on from it."""

    model_config = ConfigDict(
        extra="forbid",
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
    parameters: Annotated[GenerateParameters, BeforeValidator(lambda value: {} if value is None else value)] = Field(
        default_factory=lambda: GenerateParameters.model_validate({})
    )


class CompatRequest(GenerateRequest):
    """The body of POST /, where LoRAX's and Hugging Face's clients send both kinds of request."""

    stream: Switch = Field(False, description="Answer as /generate_stream does.")


class TokenOut(BaseModel):
    """One generated token."""

    id: int
    text: str
    logprob: float
    special: bool
    skipped: bool = Field(default=False, description="Always false; LoRAX's client wants the field.")


class StreamDetails(BaseModel):
    """What the generation took and what served it."""

    finish_reason: FinishReason
    prompt_tokens: int
    generated_tokens: int
    skipped_tokens: int = 0
    seed: int | None = Field(description="Null where nothing was drawn.")
    adapter_id: str | None
    adapter_version: str | None
    rank: int = Field(description="0 for the base model.")
    rank_reason: RankReason
    rank_policy: str | None
    mode: Mode


class Details(StreamDetails):
    """The same with every token."""

    prefill: list[Any] = Field(default_factory=list, description="Always empty.")
    tokens: list[TokenOut]


class GenerateResponse(BaseModel):
    """The generated text."""

    generated_text: str
    details: Details | None = None


class StreamResponse(BaseModel):
    """One event of a stream; text and details come with the last."""

    token: TokenOut
    generated_text: str | None = None
    details: StreamDetails | None = None


class ErrorResponse(BaseModel):
    """TGI's error body."""

    error: str
    error_type: str
