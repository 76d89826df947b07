"""What every answer says of itself, whatever its schema: what served it, how long it took, whether it ended well."""

from collections.abc import Sequence
from dataclasses import dataclass

from service.core import Event, Failed, Finished, Mode, SamplingParams, Token, TokenEvent, Usage
from service.http.generation.measurement import Measurement
from service.http.generation.stream import EventStream
from service.http.generation.submit import Submitted
from service.http.schemas import PredictedTimes, RankSegment, ServedBy, SloOut, Timing
from service.rank.rank_policy import RankReason

BASE = "base"
"""Adapter and version, in headers, of an answer by the base model alone."""


class ClientGone(Exception):
    """The client disconnected, and its request was aborted: there is nobody to answer."""


@dataclass(frozen=True)
class WholeAnswer:
    """A complete answer.

    Attributes:
        text: its JSON.
    """

    text: str
    mode: Mode
    usage: Usage


@dataclass(frozen=True)
class EndedSequence:
    """One sequence that has ended well."""

    sampling: SamplingParams
    tokens: list[Token]
    end: Finished

    @property
    def mean_logprob(self) -> float:
        """What TGI, OpenAI and vLLM rank the answers of best_of by."""
        return sum(token.logprob for token in self.tokens) / max(len(self.tokens), 1)


async def collect_sequences(submitted: Submitted) -> list[EndedSequence]:
    """Every sequence, complete.

    Raises:
        ServiceError: one failed.
        ClientGone: it was aborted.
    """
    streams = submitted.sequences.streams
    return [await _collect(*each) for each in zip(streams, submitted.samplings, strict=True)]


async def _collect(events: EventStream, sampling: SamplingParams) -> EndedSequence:
    tokens: list[Token] = []
    async for event in events:
        if isinstance(event, TokenEvent):
            tokens.append(event.token)
        else:
            end = finished_or_raise(event)
    return EndedSequence(sampling, tokens, end)


def finished_or_raise(event: Event) -> Finished:
    """A terminal event that is a success. Raises ServiceError or ClientGone."""
    match event:
        case Finished():
            return event
        case Failed():
            raise event.error
        case _:
            raise ClientGone


def served_by(submitted: Submitted, mode: Mode, usage: Usage | None = None) -> ServedBy:
    """What served a request, and how long it took where that is known."""
    adapter, decision, segments = submitted.adapter, submitted.decision, submitted.measurement.segments
    return ServedBy(
        adapter_id=adapter.name if adapter else None,
        adapter_version=adapter.version if adapter else None,
        rank=segments[-1].rank if segments else 0,
        rank_segments=[RankSegment(rank=each.rank, tokens=each.tokens) for each in segments] if len(segments) > 1 else None,
        rank_reason=decision.reason if decision else RankReason.DEFAULT,
        rank_policy=decision.policy if decision else None,
        predicted=_predicted(submitted.measurement),
        slo=_slo(submitted.measurement),
        timing=None if usage is None else _timing(usage),
        mode=mode,
    )


def _timing(usage: Usage) -> Timing:
    return Timing(
        queue_ms=round(usage.queue_s * 1000, 2),
        time_to_first_token_ms=round(usage.time_to_first_token_s * 1000, 2),
        time_per_token_ms=round((usage.total_s - usage.queue_s) * 1000 / max(usage.generated_tokens, 1), 2),
        total_ms=round(usage.total_s * 1000, 2),
    )


def _predicted(measurement: Measurement) -> PredictedTimes | None:
    times = measurement.predicted
    return None if times is None else PredictedTimes(**{name: round(ms, 2) for name, ms in times._asdict().items()})


def _slo(measurement: Measurement) -> SloOut | None:
    slo = measurement.slo
    if slo.is_empty:
        return None
    return SloOut(latency_slo_ms=slo.latency_ms, ttft_slo_ms=slo.ttft_ms, itl_slo_ms=slo.itl_ms, met=measurement.is_met)


def common_mode(ends: Sequence[Finished]) -> Mode:
    """The mode of several sequences: mixed unless all agree."""
    modes = {end.mode for end in ends}
    return modes.pop() if len(modes) == 1 else Mode.MIXED


def serving_headers(submitted: Submitted, mode: Mode) -> dict[str, str]:
    """What served the request."""
    served, measured = served_by(submitted, mode), submitted.measurement
    predicted = {"X-Predicted-Latency-Ms": f"{measured.predicted.latency_ms:.1f}"} if measured.predicted else {}
    met = {} if measured.is_met is None else {"X-SLO-Met": str(measured.is_met).lower()}
    return {
        "X-LoRA-Adapter": served.adapter_id or BASE,
        "X-LoRA-Adapter-Version": served.adapter_version or BASE,
        "X-LoRA-Rank": str(served.rank),
        "X-LoRA-Rank-Reason": served.rank_reason,
        "X-LoRA-Mode": mode,
        **predicted,
        **met,
    }


def timing_headers(usage: Usage) -> dict[str, str]:
    """LoRAX's headers: times in whole milliseconds."""
    inference_s = usage.total_s - usage.queue_s
    return {
        "x-total-time": _ms(usage.total_s),
        "x-queue-time": _ms(usage.queue_s),
        "x-inference-time": _ms(inference_s),
        "x-time-per-token": _ms(inference_s / max(usage.generated_tokens, 1)),
        "x-prompt-tokens": str(usage.prompt_tokens),
        "x-generated-tokens": str(usage.generated_tokens),
        "x-total-tokens": str(usage.prompt_tokens + usage.generated_tokens),
    }


def _ms(seconds: float) -> str:
    return str(round(seconds * 1000))
