"""From a checked body to a request that the engine has taken. Knows no HTTP; every generating route comes here."""

import asyncio
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from anyio import CapacityLimiter, to_thread

from service.core import Event, GenerationRequest, SamplingParams
from service.errors import InvalidRequest, UnknownAdapter
from service.http.arrival import Arrival
from service.http.choice import ask_of, choose, monotonic_of
from service.http.fan_out import FanOut, sequence_seed
from service.http.measurement import Measurement, SequenceMeasurement
from service.http.registry import ServedAdapter
from service.http.schemas import DEFAULT_MAX_NEW_TOKENS, GenerateParameters, GenerateRequest
from service.http.selection import select
from service.http.services import Services
from service.http.shadow import Followed
from service.http.stream import EventStream
from service.http.tracking import RequestTracker, TrackedRequest
from service.rank_policy import RankDecision

_SUBMIT_TRIES = 3
"""How often a name is looked up again when its version was unloaded between look-up and submit."""

_tokenizer_thread = CapacityLimiter(1)
# Off the event loop, because a long prompt takes long; one at a time, because fast tokenizers are not re-entrant.


@dataclass(frozen=True)
class Submitted:
    """A request that the engine has taken, as one or several sequences.

    Attributes:
        adapter: what serves it, None for the base model.
        decision: its rank, None for the base model.
        measurement: of its latency, against what was predicted and demanded.
        samplings: what the engine was told of each sequence; the first one's seed is drawn here unless given.
    """

    sequences: FanOut
    samplings: tuple[SamplingParams, ...]
    adapter: ServedAdapter | None
    decision: RankDecision | None
    measurement: Measurement

    @property
    def events(self) -> EventStream:
        """Those of the first sequence."""
        return self.sequences.streams[0]


async def submit(services: Services, body: GenerateRequest, arrival: Arrival) -> Submitted:
    """Check, tokenise, choose the rank and hand over. Whoever gets the result must close its sequences.

    The engine gets request ids of our own, which no client can repeat.

    Raises:
        InvalidRequest, IllegalRank, UnknownAdapter, AdapterUnfit: the request can't be served as it stands.
        NotReady, QueueFull, Draining: not now.
        DeadlinePassed: too late already.
        SloUnattainable: its latency objectives can't be met.
    """
    services.check_accepting()
    parameters, caller, settings = body.parameters, arrival.caller, services.settings
    deadline = arrival.deadline(settings.request_timeout_s)
    selection = select(
        parameters.adapter_id,
        parameters.rank,
        parameters.rank_policy,
        arrival.headers,
        caller.default_adapter,
        parameters.slo,
    )
    choose(services, selection, caller)  # a wrong name or rank is told before a long prompt is tokenised
    prompt_ids = await to_thread.run_sync(services.engine.encode, body.inputs, limiter=_tokenizer_thread)
    prompt_ids = prompt_ids[-parameters.truncate :] if parameters.truncate else prompt_ids
    samplings = _sequences(_sampling(services, parameters, len(prompt_ids)), parameters.best_of or 1)
    ask = ask_of(len(prompt_ids), samplings[0])
    arrived_at = monotonic_of(arrival.arrived_at, asyncio.get_running_loop().time())
    deadline.check()
    for attempt in range(1, _SUBMIT_TRIES + 1):
        chosen = choose(services, selection, caller, ask, arrived_at)
        adapter, decision = chosen.adapter, chosen.decision
        choice = adapter.choice(decision.rank) if adapter and decision else None
        full = adapter.choice(adapter.facts.ranks[-1]) if adapter else None
        name = adapter.name if adapter else None
        tracked = TrackedRequest(arrival.request_id, name, chosen.rank, len(prompt_ids), caller.name)
        measurement = chosen.measurement(services, arrived_at)
        max_unread = settings.max_unread_tokens if arrival.is_streamed else None
        sequences = FanOut(
            [
                _stream(
                    services,
                    GenerationRequest(secrets.token_hex(8), prompt_ids, sampling, choice),
                    RequestTracker(services.metrics, tracked, services.drain_rate),
                    measurement.sequence(chosen.version, ask),
                    services.shadow.follow(name, prompt_ids, choice, full),
                    max_unread,
                )
                for sampling in samplings
            ]
        )
        try:
            sequences.submit()
        except UnknownAdapter:
            if attempt == _SUBMIT_TRIES or adapter is None:
                raise UnknownAdapter(selection.adapter or "") from None
            continue
        break
    sequences.cut_at(deadline.at, deadline.error())
    if decision is not None:
        services.metrics.decided(decision)
    return Submitted(sequences, samplings, adapter, decision, measurement)


def _stream(
    services: Services,
    request: GenerationRequest,
    tracker: RequestTracker,
    measured: SequenceMeasurement,
    followed: Followed,
    max_unread: int | None,
) -> EventStream:
    def on_event(event: Event) -> None:
        measured.on_event(event)
        tracker.on_event(event)
        followed.on_event(event)

    @contextmanager
    def submitting() -> Iterator[None]:
        with measured.in_flight(), followed.in_flight():
            yield

    return EventStream(services.engine, request, on_event, max_unread, submitting)


def _sequences(sampling: SamplingParams, count: int) -> tuple[SamplingParams, ...]:
    """What each of several sequences is told. The prompt's log-probabilities are the same in all: one computes them."""
    if count > 1 and not sampling.do_sample:
        raise InvalidRequest("best_of", f"{count} greedy answers would be the same; legal: 1, or sample (do_sample)")
    others = replace(sampling, prompt_logprobs=False)
    return sampling, *(replace(others, seed=sequence_seed(sampling.seed, index)) for index in range(1, count))


def _sampling(services: Services, parameters: GenerateParameters, prompt_tokens: int) -> SamplingParams:
    if not prompt_tokens:
        raise InvalidRequest("inputs", "holds no token for this model; give some text")
    longest = services.settings.max_prompt_tokens
    if longest is not None and prompt_tokens > longest:
        raise InvalidRequest("inputs", f"{prompt_tokens} prompt tokens are above this server's limit; legal: 1 to {longest}")
    new_tokens = parameters.max_new_tokens or DEFAULT_MAX_NEW_TOKENS
    limit = services.settings.max_new_tokens_limit
    if limit is not None and new_tokens > limit:
        if parameters.max_new_tokens is not None:
            raise InvalidRequest("max_new_tokens", f"{new_tokens} is above this server's limit; legal: 1 to {limit}")
        new_tokens = limit
    context = services.engine.model.max_context_tokens
    if new_tokens >= context:
        raise InvalidRequest(
            "max_new_tokens", f"{new_tokens} leaves no prompt in the context of {context} tokens; legal: 1 to {context - 1}"
        )
    if prompt_tokens + new_tokens > context:
        raise InvalidRequest(
            "inputs",
            f"{prompt_tokens} prompt tokens and max_new_tokens {new_tokens} make {prompt_tokens + new_tokens}, above "
            f"the context of {context} tokens; shorten the prompt, lower max_new_tokens, or set truncate to at most "
            f"{context - new_tokens}",
        )
    least = parameters.min_new_tokens or 0
    if least > new_tokens:
        raise InvalidRequest("min_new_tokens", f"{least} is above max_new_tokens {new_tokens}; legal: 0 to {new_tokens}")
    do_sample = parameters.is_sampling
    temperature = parameters.temperature
    return SamplingParams(
        max_new_tokens=new_tokens,
        min_new_tokens=least,
        repetition_penalty=_or(parameters.repetition_penalty, 1.0),
        presence_penalty=_or(parameters.presence_penalty, 0.0),
        frequency_penalty=_or(parameters.frequency_penalty, 0.0),
        logit_bias=tuple(parameters.logit_bias.items()),
        do_sample=do_sample,
        temperature=temperature if do_sample and temperature is not None else 1.0,
        top_k=parameters.top_k,
        top_p=_or(parameters.top_p, 1.0),
        min_p=_or(parameters.min_p, 0.0),
        typical_p=_or(parameters.typical_p, 1.0),
        # 53 bits: what every JSON reader keeps exactly.
        seed=secrets.randbits(53) if parameters.seed is None else parameters.seed,
        stop=tuple(parameters.stop),
        stop_token_ids=tuple(parameters.stop_token_ids),
        include_stop=parameters.include_stop_str_in_output,
        ignore_eos=parameters.ignore_eos_token,
        alternatives=max(parameters.top_n_tokens or 0, parameters.return_k_alternatives or 0),
        prompt_logprobs=parameters.decoder_input_details,
    )


def _or(value: float | None, neutral: float) -> float:
    return neutral if value is None else value
