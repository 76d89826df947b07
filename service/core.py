"""The nouns that every part of the service shares. No torch here: scheduling and HTTP are tested without it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Protocol

from service.errors import ServiceError

if TYPE_CHECKING:
    from adapters.adapter import Adapter


class Mode(StrEnum):
    """How a step applied the adapters of its rows."""

    BASE = "base"
    """No row has an adapter."""
    MERGED = "merged"
    """All rows share one (adapter, rank), whose merged weights ran in the base's place."""
    MIXED = "mixed"
    """One masked product pair served every adapter and rank of the step."""


class FinishReason(StrEnum):
    """Why a generation ended, in text-generation-inference's words."""

    LENGTH = "length"
    EOS_TOKEN = "eos_token"
    STOP_SEQUENCE = "stop_sequence"


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen. Greedy unless `do_sample`.

    Attributes:
        max_new_tokens: at least 1.
        do_sample: draw from the distribution instead of taking its maximum.
        temperature: divides the logits; above 0.
        top_k: keep the k most probable tokens; None keeps all.
        top_p: keep the smallest set of tokens whose probability reaches p; in (0, 1].
        seed: the same seed gives the same text, whatever else is in the batch.
        stop: generation ends after any of these texts; the text is kept in the answer, as TGI and LoRAX do.
        ignore_eos: go on after the end-of-sequence token.
    """

    max_new_tokens: int = 20
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False


@dataclass(frozen=True)
class AdapterChoice:
    """The adapter and rank of one request; the unit that merging and batching see.

    Attributes:
        version: content digest of the adapter, never its name: a name may be replaced while requests run.
        rank: one of the adapter's legal ranks.
        scale: the config's scale at that rank.
    """

    version: str
    rank: int
    scale: float


@dataclass(frozen=True)
class GenerationRequest:
    """One request as the engine sees it: checked, tokenised, its rank decided.

    Attributes:
        request_id: unique among the requests in flight.
        prompt_ids: at least one token; with max_new_tokens within the model's context.
        adapter: None for the base model alone.
    """

    request_id: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    adapter: AdapterChoice | None = None


@dataclass(frozen=True)
class Token:
    """One generated token.

    Attributes:
        text: what this token adds to the text. "" while a multi-byte character is incomplete; the token that completes
            it carries all of it. The texts of all tokens joined are the whole generated text.
        logprob: natural logarithm of its probability under the model, before temperature and filters.
        special: an end-of-sequence or other control token, which is not part of the text.
    """

    id: int
    text: str
    logprob: float
    special: bool = False


@dataclass(frozen=True)
class Usage:
    """What a request took. Times are in seconds."""

    prompt_tokens: int
    generated_tokens: int
    queue_s: float
    time_to_first_token_s: float
    total_s: float


@dataclass(frozen=True)
class TokenEvent:
    """A token was generated."""

    request_id: str
    token: Token
    mode: Mode


@dataclass(frozen=True)
class Finished:
    """Terminal: the generation is complete.

    `mode` is base without adapter, merged if every step that made a token ran merged, else mixed.
    """

    request_id: str
    reason: FinishReason
    text: str
    mode: Mode
    usage: Usage


@dataclass(frozen=True)
class Aborted:
    """Terminal: the request was aborted by its sender."""

    request_id: str


@dataclass(frozen=True)
class Failed:
    """Terminal: the request ended through an error."""

    request_id: str
    error: ServiceError


Event = TokenEvent | Finished | Aborted | Failed
"""Every submitted request gets any number of TokenEvents and then exactly one terminal event."""

EventSink = Callable[[Event], None]
"""Called from the engine's thread: it must return at once and must not raise."""


@dataclass(frozen=True)
class ModelFacts:
    """What the server knows of its base model."""

    name: str
    model_type: str
    dtype: str
    device: str
    parameters: int
    nbytes: int
    vocab_size: int
    max_context_tokens: int


@dataclass(frozen=True)
class CacheStats:
    """Counters of the merged-weights cache since start."""

    hits: int = 0
    misses: int = 0
    evictions: int = 0
    nbytes: int = 0


@dataclass(frozen=True)
class PrefixStats:
    """Counters of the prefix cache since start.

    Attributes:
        hits: admissions that found the first blocks of their prompt.
        misses: admissions that found none.
        evictions: blocks whose space was needed.
        reused_tokens: tokens whose keys and values were found instead of computed.
    """

    hits: int = 0
    misses: int = 0
    evictions: int = 0
    reused_tokens: int = 0


@dataclass(frozen=True)
class EngineStats:
    """A snapshot, cheap to take at any time from any thread.

    Blocks that are neither used nor cached are free; a cached one holds a prefix that no request uses, and makes room for
    any that needs it.
    """

    running: int = 0
    waiting: int = 0
    kv_blocks_used: int = 0
    kv_blocks_cached: int = 0
    kv_blocks_total: int = 0
    resident_adapters: int = 0
    adapter_bytes: int = 0
    merged: CacheStats = field(default_factory=CacheStats)
    prefix: PrefixStats = field(default_factory=PrefixStats)


@dataclass(frozen=True)
class StepReport:
    """One step of the engine, told to the observer."""

    mode: Mode
    prefill_tokens: int
    decode_rows: int
    seconds: float


class EngineObserver(Protocol):
    """Is told what the engine does, from the engine's thread. Metrics implements it."""

    def on_step(self, report: StepReport) -> None:
        """A step ended."""

    def on_merge(self, seconds: float) -> None:
        """Merged weights were computed."""


class EngineProtocol(Protocol):
    """What the HTTP layer knows of the engine. `FakeEngine` is the other implementation."""

    @property
    def model(self) -> ModelFacts:
        """Facts of the base model."""

    def start(self) -> None:
        """Start the engine's thread."""

    def stop(self) -> None:
        """End at once: what runs is failed. Idempotent."""

    def drain(self, timeout_s: float) -> bool:
        """Refuse new requests and wait until what runs has ended; True if all ended in time."""

    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids of a prompt, as the model's own tokenizer gives them."""

    def load(self, version: str, adapter: Adapter) -> None:
        """Make an adapter servable. Idempotent per version.

        Raises:
            adapters.errors.InvalidAdapter: it does not fit the base model; every offender is listed.
        """

    def unload(self, version: str) -> None:
        """Forget an adapter. Requests in flight keep it until they end. Unknown versions are ignored."""

    def submit(self, request: GenerationRequest, sink: EventSink) -> None:
        """Queue a request. If this returns, exactly one terminal event will follow.

        Raises:
            QueueFull, Draining: the request was not taken.
            UnknownAdapter: its version is not loaded.
            InvalidRequest: it does not fit the model's context.
        """

    def abort(self, request_id: str) -> None:
        """End a request if it still runs; its place is free before the next step. Unknown ids are ignored."""

    def stats(self) -> EngineStats:
        """Counts at this moment."""
