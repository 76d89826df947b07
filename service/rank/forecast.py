"""How long a request will take that arrives now: the latency model's steps, put together as the scheduler does it."""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from service.core import Mode
from service.rank.latency_model import LatencyModel, StepTime
from service.rank.load import Load, Traffic
from service.slo import Times


@dataclass(frozen=True)
class EngineSizes:
    """What the scheduler goes by; see `EngineOptions`."""

    max_running: int
    max_batch_tokens: int
    prefill_chunk_tokens: int


@dataclass(frozen=True)
class Ask:
    """The work that a request brings: its prompt, and the most and the fewest tokens that it may make."""

    prompt_tokens: int
    new_tokens: int
    least_tokens: int = 1


@dataclass(frozen=True)
class Alike:
    """The step that a request will share with those that arrive next, if all are given the same rank.

    One request's columns hardly move a step that 32 adapters share, yet all of them together more than double it; and a slower
    step holds more requests, which make it slower still. By Little's law the others in flight are `arriving tokens * step`, so

        step = base + slope * tokens_per_s * step + reading_s * prompt_tokens_per_s * step

    where `base` is a step of one row and `slope` what each further row adds, all three rising with the rank.

    Attributes:
        traffic: what arrives.
        base: a step of one row.
        slope: what one row more adds.
        reading: what one prompt token adds.
    """

    traffic: Traffic
    base: StepTime
    slope: StepTime
    reading: StepTime

    def step_s(self, rank: int) -> float:
        """Its seconds at a rank. Where more arrives than can be served there is no such step: then very many."""
        columns = rank * max(1, self.traffic.adapters)
        taken = self.traffic.new_tokens_per_s * self.slope.at(columns, rank)
        taken += self.traffic.prompt_tokens_per_s * self.reading.at(columns, rank)
        return self.base.at(columns, rank) / max(1 - taken, _LEAST_FREE)


_LEAST_FREE = 0.02


@dataclass(frozen=True)
class Forecast:
    """The times of one request, at any rank that it may be given; none falls as the rank rises.

    Attributes:
        ask: the request.
        load: what is in flight when it arrives.
        gap: a step in which all generate, it included.
        reading: the steps until its prompt is read, together.
        reading_steps: their number, at least 1; a fraction for the step that runs when it arrives.
        others_tokens: prompt tokens that are read before its own.
        waiting_gaps: steps that it waits for a place among the running.
        alike: what the step becomes if all that arrive are given its rank; None where others' ranks do not follow its own.
    """

    ask: Ask
    load: Load
    gap: StepTime
    reading: StepTime
    reading_steps: float
    others_tokens: int
    waiting_gaps: float
    alike: Alike | None = None

    def at(self, rank: int) -> Times:
        """Its times at a rank, 0 for the base."""
        return self._times(rank, self.ask.new_tokens)

    def soonest(self, rank: int) -> Times:
        """Its times at a rank if its answer is as short as it may be."""
        return self._times(rank, self.ask.least_tokens)

    def step_s(self, rank: int) -> float:
        """Seconds of a step while it generates: what the others feel of it.

        While it runs, those that it finds end, and others take their places: in the mean half of them.
        """
        now_s = self._lines[0].at(rank, self.load.own_rank)
        return now_s if self.alike is None else (now_s + self.alike.step_s(rank)) / 2

    def _times(self, rank: int, tokens: int) -> Times:
        gap_ms = 1000 * self.step_s(rank)
        first_ms = 1000 * self._lines[1].at(rank, self.load.own_rank) + self.waiting_gaps * gap_ms
        return Times(first_ms, gap_ms, first_ms + (tokens - 1) * gap_ms)

    @cached_property
    def _lines(self) -> tuple["_Line", "_Line"]:
        """Seconds of a step now, and until its prompt is read."""
        load = self.load
        columns = _Line(load.columns, 0.0, 1.0)
        row_ranks = _Line(load.row_ranks, 1.0, 0.0)
        # `reading` is a sum of steps, in which prompt tokens enter by the mean of their ranks.
        others_share = self.others_tokens / (load.in_flight + 1) / self.reading_steps
        of_prompts = _Line(0.0, self.ask.prompt_tokens / self.reading_steps, 0.0)
        prompt_ranks = row_ranks.plus(row_ranks, others_share).plus(of_prompts, 1.0)
        return _step_line(self.gap, columns, row_ranks), _step_line(self.reading, columns, prompt_ranks)


class _Line(NamedTuple):
    """A quantity over the rank. Columns of the adapter up to the largest rank in flight are in use anyway: new ones are those
    above.
    """

    fixed: float
    per_rank: float
    per_new_column: float

    def at(self, rank: int, own_rank: int) -> float:
        new_columns = rank - own_rank if rank > own_rank else 0
        return self.fixed + self.per_rank * rank + self.per_new_column * new_columns

    def plus(self, other: "_Line", factor: float) -> "_Line":
        return _Line(
            self.fixed + factor * other.fixed,
            self.per_rank + factor * other.per_rank,
            self.per_new_column + factor * other.per_new_column,
        )


def alike(model: LatencyModel, load: Load, context_tokens: float, mode: Mode) -> Alike | None:
    """What the model says of a step that all share who arrive; None while it has seen too little."""
    traffic, rows = load.traffic, max(_SOME_ROWS, load.in_flight)
    of_one = context_tokens / (load.in_flight + 1)

    def step(rows: int, prefill_tokens: int) -> StepTime | None:
        return model.step_time(
            mode,
            decode_rows=rows,
            prefill_tokens=prefill_tokens,
            context_tokens=of_one * rows,
            adapters=min(rows, traffic.adapters),
        )

    one, many, with_prompt = step(1, 0), step(rows, 0), step(rows, _SOME_ROWS)
    if one is None or many is None or with_prompt is None:
        return None
    return Alike(traffic, one, _slope(one, many, rows - 1), _slope(many, with_prompt, _SOME_ROWS))


_SOME_ROWS = 16


def _slope(less: StepTime, more: StepTime, steps: int) -> StepTime:
    return StepTime(*(max(0.0, high - low) / steps for low, high in zip(less, more, strict=True)))


def _step_line(step: StepTime, columns: _Line, row_ranks: _Line) -> _Line:
    return _Line(step.fixed_s, 0.0, 0.0).plus(columns, step.per_column_s).plus(row_ranks, step.per_row_rank_s)


def forecast(model: LatencyModel, ask: Ask, load: Load, sizes: EngineSizes, mode: Mode) -> Forecast | None:
    """Predict a request that arrives now, if its steps run in this mode; None while the model has seen too little.

    Prompts are read in the order of arrival, in chunks beside the rows that generate; a request for which there is no
    place waits until those before it have ended, which do so at the rate of Little's law.
    """
    rows = min(load.in_flight, sizes.max_running - 1)
    decoding = min(load.decoding, sizes.max_running - 1)
    adapters = load.adapters + (mode is Mode.MIXED and not load.own_rank)
    context = load.context_tokens + load.waiting_prompt_tokens + ask.prompt_tokens + ask.new_tokens // 2
    gap = model.step_time(mode, decode_rows=rows + 1, prefill_tokens=0, context_tokens=context, adapters=adapters)
    tokens = load.waiting_prompt_tokens + ask.prompt_tokens
    chunk = sizes.max_batch_tokens - decoding
    if decoding:
        chunk = min(chunk, sizes.prefill_chunk_tokens + decoding)
    full, rest = divmod(tokens, chunk)
    whole = last = None
    if full:
        whole = model.step_time(
            mode, decode_rows=decoding, prefill_tokens=chunk, context_tokens=load.context_tokens + tokens / 2, adapters=adapters
        )
    if rest:
        last = model.step_time(
            mode, decode_rows=decoding, prefill_tokens=rest, context_tokens=load.context_tokens + tokens, adapters=adapters
        )
    if gap is None or (whole is None and last is None):
        return None
    running = 0.5 if decoding else 0.0  # of the step that runs when it arrives, half is left in the mean
    parts = [(each, count) for each, count in ((whole, full), (last, 1), (gap, running)) if each is not None and count]
    reading = StepTime(*(sum(count * each[i] for each, count in parts) for i in range(3)))
    missing = max(0, load.in_flight + 1 - sizes.max_running)
    mean_remaining = load.remaining_tokens / load.in_flight if load.in_flight else 0.0
    return Forecast(
        ask=ask,
        load=load,
        gap=gap,
        reading=reading,
        reading_steps=max(1.0, sum(count for _, count in parts)),
        others_tokens=load.waiting_prompt_tokens,
        waiting_gaps=missing * mean_remaining / sizes.max_running,
    )
