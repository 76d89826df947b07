"""The nouns that every part of the service shares. No torch here: scheduling and HTTP are tested without it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, NamedTuple, Protocol

from service.errors import InvalidRequest, ServiceError

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


class Compile(StrEnum):
    """Whether machine code is made for the processor at hand."""

    AUTO = "auto"
    """Where there is a compiler: kernels, for blocks of Llama's kind as a whole; large models of others by torch.compile."""
    ON = "on"
    """Kernels for products and attention, torch.compile for blocks of every kind."""
    OFF = "off"


class FinishReason(StrEnum):
    """Why a generation ended, in text-generation-inference's words."""

    LENGTH = "length"
    EOS_TOKEN = "eos_token"
    STOP_SEQUENCE = "stop_sequence"
    """A stop text or a stop token."""


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen. Greedy unless `do_sample`.

    Penalties, bias and `min_new_tokens` act on greedy requests too. They come first, in the order of the fields below;
    then temperature, top_k, top_p, min_p and typical_p, each on what the one before it has left, as in transformers.

    Attributes:
        max_new_tokens: at least 1.
        min_new_tokens: before that many tokens none that ends the generation is chosen, and no stop text ends it.
        repetition_penalty: divides the positive and multiplies the negative logits of the tokens that occur in prompt or
            answer (Keskar et al., arXiv 1909.05858); above 0, 1 is neutral.
        presence_penalty: taken from the logits of the tokens that occur in the answer, as OpenAI defines it.
        frequency_penalty: taken from them once for each time that they occur.
        logit_bias: (token id, added to its logit); no id twice, all inside the vocabulary.
        do_sample: draw from the distribution instead of taking its maximum.
        temperature: divides the logits; above 0.
        top_k: keep the k most probable tokens, and those as probable as the last of them; None keeps all.
        top_p: keep the smallest set of tokens whose probability reaches p (Holtzman et al., arXiv 1904.09751); in [0, 1].
        min_p: keep the tokens at least this fraction as probable as the most probable one (Nguyen et al., arXiv
            2407.01082); in [0, 1].
        typical_p: keep the tokens whose information is nearest the expected one, until their probability reaches p
            (Meister et al., arXiv 2202.00666); in (0, 1].
        seed: of the random numbers that tokens are drawn with.
        is_repeatable: the same seed gives the same text, whatever else is in the batch; for a seed that the client knows.
            Without, steps may run with merged weights, which round otherwise.
        stop: generation ends after any of these texts.
        stop_token_ids: generation ends after any of these tokens.
        include_stop: the stop text, or the text of the stop token, is part of the answer, as TGI and LoRAX have it. Without,
            no part of it is ever told, also while only its beginning has been generated.
        ignore_eos: go on after the end-of-sequence token.
        alternatives: how many of the most probable tokens to tell with every token.
        prompt_logprobs: tell the log-probability of every token of the prompt, and its alternatives.
    """

    max_new_tokens: int = 20
    min_new_tokens: int = 0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    seed: int = 0
    is_repeatable: bool = False
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop: bool = True
    ignore_eos: bool = False
    alternatives: int = 0
    prompt_logprobs: bool = False

    def check_token_ids(self, vocab_size: int) -> None:
        """Raise InvalidRequest for a token id that the model does not have."""
        for name, ids in (("logit_bias", dict(self.logit_bias)), ("stop_token_ids", self.stop_token_ids)):
            unknown = [token for token in ids if not 0 <= token < vocab_size]
            if unknown:
                raise InvalidRequest(name, f"no token has id {unknown[0]}; legal: 0 to {vocab_size - 1}")


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
        group: what it has in common with the other sequences of one client's request; they share the keys and values of a
            common prompt also where `prefix_cache` is off, since that tells nobody anything.
        tenant: whose it is; those who wait are admitted in turn, however many requests each of them has.
    """

    request_id: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    adapter: AdapterChoice | None = None
    group: str | None = None
    tenant: str | None = None


class Alternative(NamedTuple):
    """A token that could have been chosen.

    Attributes:
        text: of this token by itself; bytes that are only a part of a character become replacement characters.
        logprob, special: as `Token` has them.
    """

    id: int
    text: str
    logprob: float
    special: bool = False


class PromptToken(NamedTuple):
    """A token of the prompt, as `Alternative`. `logprob` is None for the first one, which follows nothing.

    Attributes:
        alternatives: the most probable tokens in its place, as `Token` has them.
    """

    id: int
    text: str
    logprob: float | None
    special: bool = False
    alternatives: tuple[Alternative, ...] = ()


@dataclass(frozen=True)
class Token:
    """One generated token.

    Attributes:
        text: what this token adds to the text. "" while a multi-byte character, or what may become an excluded stop text, is
            incomplete; the token that completes it carries all of it. The texts of all tokens joined are the answer.
        logprob: natural logarithm of its probability under the model, before penalties, bias, temperature and filters.
        special: an end-of-sequence or other control token, which is not part of the text.
        alternatives: the most probable tokens in its place, most probable first; as many as `SamplingParams.alternatives`.
    """

    id: int
    text: str
    logprob: float
    special: bool = False
    alternatives: tuple[Alternative, ...] = ()


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
    """A token was generated, at `rank`, 0 for the base. If it `is_last`, the next event is Finished."""

    request_id: str
    token: Token
    mode: Mode
    is_last: bool = False
    rank: int = 0


@dataclass(frozen=True)
class Finished:
    """Terminal: the generation is complete.

    `mode` is base without adapter, merged if every step that made a token ran merged, else mixed. `prompt` holds the
    prompt's tokens if `SamplingParams.prompt_logprobs` asked for them.
    """

    request_id: str
    reason: FinishReason
    text: str
    mode: Mode
    usage: Usage
    prompt: tuple[PromptToken, ...] = ()


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
    """What the server knows of its base model.

    Attributes:
        longest_token: characters of a text that one token stands for at most; None where its tokenizer sets no bound.
    """

    name: str
    model_type: str
    dtype: str
    device: str
    parameters: int
    nbytes: int
    vocab_size: int
    max_context_tokens: int
    longest_token: int | None = None


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

    Attributes:
        merged_choices: the pairs whose merged weights are held.
    """

    running: int = 0
    waiting: int = 0
    kv_blocks_used: int = 0
    kv_blocks_cached: int = 0
    kv_blocks_total: int = 0
    resident_adapters: int = 0
    adapter_bytes: int = 0
    merged: CacheStats = field(default_factory=CacheStats)
    merged_choices: frozenset[AdapterChoice] = frozenset()
    prefix: PrefixStats = field(default_factory=PrefixStats)


@dataclass(frozen=True)
class StepReport:
    """One step of the engine, told to the observer: its work, and how long it took.

    Attributes:
        seconds: from its first row's packing to its last token's choice.
        pause_s: from the end of the step before it, where there was work all the time: clients were told, and it was planned.
        columns: adapter columns in use: the sum over its distinct adapters of the largest rank among their rows.
        row_ranks: the sum over its rows, prompt tokens included, of their own ranks.
        adapters: its distinct adapters.
        context_tokens: tokens whose keys and values its chunks read, their own included.
    """

    mode: Mode
    prefill_tokens: int
    decode_rows: int
    seconds: float
    columns: int = 0
    row_ranks: int = 0
    adapters: int = 0
    context_tokens: int = 0
    pause_s: float = 0.0

    @property
    def cycle_s(self) -> float:
        """What each such step takes of the time of those in flight."""
        return self.pause_s + self.seconds


class EngineObserver(Protocol):
    """Is told what the engine does, from the engine's thread. Metrics implements it."""

    def on_step(self, report: StepReport) -> None:
        """A step ended."""

    def on_merge(self, seconds: float) -> None:
        """Merged weights were computed."""


class EngineProtocol(Protocol):
    """What the HTTP layer knows of the engine. Its tests have an implementation without a model."""

    @property
    def model(self) -> ModelFacts:
        """Facts of the base model."""

    @property
    def is_alive(self) -> bool:
        """False once it has failed as a whole: it answers nothing any more, and only a new process does."""

    def start(self) -> None:
        """Start the engine's thread."""

    def stop(self) -> None:
        """End at once: what runs is failed. Idempotent."""

    def drain(self, timeout_s: float) -> bool:
        """Refuse new requests and wait until what runs has ended; True if all ended in time."""

    def encode(self, text: str, *, with_special: bool = True) -> tuple[int, ...]:
        """Token ids of a prompt, as the model's own tokenizer gives them.

        Args:
            with_special: with what the tokenizer puts around a text (a beginning of sequence, say).
        """

    def chat_text(
        self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool, continue_final_message: bool
    ) -> str:
        """The prompt of a conversation, by the tokenizer's chat template, which writes what belongs around it as well.

        Args:
            messages: each with a role and its content, perhaps a name.
            add_generation_prompt: with the opening of the assistant's answer.
            continue_final_message: leave the last message open, for the answer to go on from.

        Raises:
            InvalidRequest: the tokenizer has no chat template, or the template refuses the conversation.
        """

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some tokens, without the special ones."""

    def adaptable_modules(self) -> Mapping[str, tuple[int, int]]:
        """Paths of the linear modules inside the model's blocks, which adapters usually adapt, with their (in, out)."""

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
            QueueFull, Draining, EngineDown: the request was not taken.
            UnknownAdapter: its version is not loaded.
            InvalidRequest: it does not fit the model's context, or names a token that the model does not have.
        """

    def submit_all(self, asked: Sequence[tuple[GenerationRequest, EventSink]]) -> None:
        """Queue several requests, or none of them. Raises as `submit` does."""

    def abort(self, request_id: str) -> None:
        """End a request if it still runs; its place is free before the next step. Unknown ids are ignored."""

    def change_rank(self, request_id: str, choice: AdapterChoice) -> None:
        """Let a request go on at another rank of its adapter from the next step on; the keys and values that it has stay.

        Unknown ids are ignored.
        """

    def stats(self) -> EngineStats:
        """Counts at this moment."""
