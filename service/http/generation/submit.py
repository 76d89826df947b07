"""From a task to a request that the engine has taken. Knows neither HTTP nor schemas; every generating route comes here."""

import asyncio
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TypeVar

from anyio import CancelScope, CapacityLimiter, to_thread

from service.core import EngineProtocol, Event, GenerationRequest, SamplingParams
from service.errors import InvalidRequest, UnknownAdapter
from service.http.adapters.served_adapter import ServedAdapter
from service.http.generation.arrival import Arrival, Deadline
from service.http.generation.choice import Choice, ask_of, choose, monotonic_of
from service.http.generation.fan_out import FanOut, sequence_seed
from service.http.generation.measurement import Measurement, SequenceMeasurement
from service.http.generation.selection import select
from service.http.generation.stream import EventStream
from service.http.generation.token_limits import TokenLimits
from service.http.generation.tracking import RequestTracker, TrackedRequest
from service.http.services import Services
from service.http.shadow import Followed
from service.rank.prospect import Ask
from service.rank.rank_policy import RankDecision, RankWish
from service.slo import NO_SLO, Slo

_SUBMIT_TRIES = 3
"""How often a name is looked up again when its version was unloaded between look-up and submit."""

_SHORT_CHARACTERS = 8192
"""Of texts that are tokenised in a few milliseconds."""
_short_texts, _long_texts = CapacityLimiter(1), CapacityLimiter(1)

Made = TypeVar("Made")
Prompts = tuple[tuple[int, ...], ...]
"""Token ids of each."""


@dataclass(frozen=True)
class Task:
    """What a request asks for, whatever schema it came in.

    Attributes:
        adapter, rank, policy: as the body names them; `select` joins them with the headers.
        encode: token ids of each prompt. Called in a thread. Raises InvalidRequest.
        sampling: what the engine is to be told of a prompt, by its token ids. Raises InvalidRequest.
        characters: of all prompts.
        prompts, copies: how many prompts there are, and how many sequences to make of each.
        slo: its latency objectives, perhaps none.
        adapter_field, copies_field: what the schema calls them, for errors; how_to_sample: what it takes to draw tokens.
    """

    adapter: str | None
    rank: RankWish
    policy: str | None
    encode: Callable[[EngineProtocol, TokenLimits], Prompts]
    sampling: Callable[[Sequence[int], TokenLimits], SamplingParams]
    characters: int
    prompts: int = 1
    copies: int = 1
    slo: Slo = NO_SLO
    adapter_field: str = "adapter_id"
    copies_field: str = "best_of"
    how_to_sample: str = "do_sample"


@dataclass(frozen=True)
class Submitted:
    """A request that the engine has taken, as one or several sequences.

    Attributes:
        sequences: those of the first prompt, then those of the second, and so on.
        prompts: token ids of each prompt.
        samplings: what the engine was told of each sequence; the first one's seed is drawn here unless given.
        adapter: what serves it, None for the base model.
        decision: its rank, None for the base model.
        measurement: of its latency, against what was predicted and demanded.
    """

    sequences: FanOut
    prompts: tuple[tuple[int, ...], ...]
    samplings: tuple[SamplingParams, ...]
    adapter: ServedAdapter | None
    decision: RankDecision | None
    measurement: Measurement


async def submit(services: Services, task: Task, arrival: Arrival) -> Submitted:
    """Tokenise, check, choose the rank and hand over. Whoever gets the result must close its sequences.

    The engine gets request ids of our own, which no client can repeat.

    Raises:
        InvalidRequest, IllegalRank, UnknownAdapter, AdapterUnfit: the request can't be served as it stands.
        NotReady, QueueFull, Draining, EngineDown, KeyOverLimit: not now.
        DeadlinePassed: too late already.
        SloUnattainable: its latency objectives can't be met.
    """
    services.check_accepting()
    caller, settings = arrival.caller, services.settings
    deadline = arrival.deadline(settings.request_timeout_s)
    headers, default = arrival.headers, caller.default_adapter
    selection = select(task.adapter, task.rank, task.policy, headers, default, field=task.adapter_field, slo=task.slo)
    await services.find_adapter(selection.adapter, caller.name)
    choose(services, selection, caller)  # a wrong name or rank is told before a long prompt is tokenised
    arrival.admission.count(task.prompts * task.copies, task.copies_field if task.prompts == 1 else "prompt")
    limits = TokenLimits.of(settings, services.engine.model)
    prompts = await _tokenized(task, services.engine, limits, deadline)
    asked = [(prompt, each) for prompt in prompts for each in _copies(task.sampling(prompt, limits), task)]
    arrived_at = monotonic_of(arrival.arrived_at, asyncio.get_running_loop().time())
    deadline.check()
    for attempt in range(1, _SUBMIT_TRIES + 1):
        choice = choose(services, selection, caller, _asks(asked, task.copies), arrived_at)
        measurement = choice.measurement(services, arrived_at)
        sequences = _fan_out(services, asked, arrival, choice, measurement)
        try:
            sequences.submit()
        except UnknownAdapter:
            if attempt == _SUBMIT_TRIES or choice.adapter is None:
                raise UnknownAdapter(selection.adapter or "") from None
            continue
        break
    services.metrics.prompts_taken(sum(map(len, prompts)))
    sequences.cut_at(deadline.at, deadline.error())
    if choice.decision is not None:
        services.metrics.decided(choice.decision)
    samplings = tuple(sampling for _, sampling in asked)
    return Submitted(sequences, prompts, samplings, choice.adapter, choice.decision, measurement)


async def _tokenized(task: Task, engine: EngineProtocol, limits: TokenLimits, deadline: Deadline) -> Prompts:
    with CancelScope(deadline=deadline.at):  # ends the wait for the others' texts; the own one, once begun, is read to its end
        return await tokenizing(lambda each: task.encode(each, limits), engine, task.characters)
    raise deadline.error()


async def tokenizing(work: Callable[[EngineProtocol], Made], engine: EngineProtocol, characters: int) -> Made:
    """What needs the engine's tokenizer, off the event loop, because a long text takes long.

    A text waits for those of its kind, short or long, one at a time: no long one delays the first token of a short one, and no
    more than two threads take time from the engine's.
    """
    limiter = _short_texts if characters <= _SHORT_CHARACTERS else _long_texts
    return await to_thread.run_sync(work, engine, limiter=limiter)


def _asks(asked: Sequence[tuple[tuple[int, ...], SamplingParams]], copies: int) -> list[Ask]:
    """The work of each sequence. The engine reads a prompt once for all of its copies, but for its last tokens."""
    return [ask_of(1 if number % copies else len(prompt), sampling) for number, (prompt, sampling) in enumerate(asked)]


def _copies(sampling: SamplingParams, task: Task) -> tuple[SamplingParams, ...]:
    """What each sequence of a prompt is told. The prompt's log-probabilities are the same in all: one computes them."""
    if task.copies > 1 and not sampling.do_sample:
        message = f"{task.copies} greedy answers would be the same; legal: 1, or sample ({task.how_to_sample})"
        raise InvalidRequest(task.copies_field, message)
    others = replace(sampling, prompt_logprobs=False)
    return sampling, *(replace(others, seed=sequence_seed(sampling.seed, copy)) for copy in range(1, task.copies))


def _fan_out(
    services: Services,
    asked: Sequence[tuple[tuple[int, ...], SamplingParams]],
    arrival: Arrival,
    chosen: Choice,
    measurement: Measurement,
) -> FanOut:
    adapter = chosen.adapter.name if chosen.adapter else None
    choice = chosen.adapter.choice(chosen.rank) if chosen.adapter else None
    full = chosen.adapter.choice(chosen.adapter.facts.ranks[-1]) if chosen.adapter else None
    reason = chosen.decision.reason if chosen.decision else None
    max_unread = services.settings.max_unread_tokens if arrival.is_streamed else None
    arrived = asyncio.Event()
    group = secrets.token_hex(8)
    is_alone = len(asked) == 1  # of several sequences, one answer could not say which had which rank
    streams = []
    for prompt_ids, sampling in asked:
        tracked = TrackedRequest(arrival.request_id, adapter, chosen.rank, len(prompt_ids), arrival.caller.name, reason)
        request = GenerationRequest(secrets.token_hex(8), prompt_ids, sampling, choice, group, arrival.caller.name or None)
        change = _changing(services.engine, request.request_id, chosen.adapter) if is_alone else None
        observers = _Observers(
            measurement.sequence(chosen.version, ask_of(len(prompt_ids), sampling), change),
            RequestTracker(services.metrics, services.drain_rate, services.latencies, tracked, measurement.arrived_at),
            services.shadow.follow(adapter, prompt_ids, choice, full),
        )
        streams.append(EventStream(services.engine, request, observers.on_event, max_unread, arrived, observers.in_flight))
    return FanOut(streams, arrived)


def _changing(engine: EngineProtocol, request_id: str, adapter: ServedAdapter | None) -> Callable[[int], None] | None:
    if adapter is None:
        return None
    return lambda rank: engine.change_rank(request_id, adapter.choice(rank))


@dataclass(frozen=True)
class _Observers:
    """All that follows one sequence."""

    measured: SequenceMeasurement
    tracker: RequestTracker
    followed: Followed

    @contextmanager
    def in_flight(self) -> Iterator[None]:
        with self.measured.in_flight(), self.followed.in_flight():
            yield

    def on_event(self, event: Event) -> None:
        self.measured.on_event(event)  # first: whoever hears of the end may ask for the verdict at once
        self.tracker.on_event(event)
        self.followed.on_event(event)
