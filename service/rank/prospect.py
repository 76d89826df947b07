"""How long the next steps will take, and a request among them, at each price of a column: the latency model's steps, put
together as the scheduler does it.

Everything that does not depend on who asks is computed once after a step, for all prices at once; a request then takes a few
sums.
"""

from dataclasses import dataclass

import numpy as np

from service.core import Mode
from service.rank.ladder import Floats
from service.rank.latency_model import LatencyModel, StepTime
from service.rank.load import LoadBook, Traffic
from service.slo import Times

_LEAST_FREE = 0.1
"""Of the time, as what arrives may take more than there is."""


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


class Prospect:
    """The steps that come next with what is in flight, and one request more, if they run in this mode.

    Attributes:
        gap_s: seconds of a step in which all generate, at each price; where what arrives lately will make it slower, the mean
            of now and then.
        now_s: a step in which those generate that do so already.
        token_s: seconds that a prompt token adds to such a step, at each price.
        chunk: prompt tokens that a step reads.
        line: of `gap_s`, for what one request adds to it.
        decoding, in_flight, waiting_prompt_tokens, remaining_tokens: as the book has them.
    """

    def __init__(
        self, model: LatencyModel, book: LoadBook, sizes: EngineSizes, mode: Mode, now: float, prompt_tokens: int = 0
    ) -> None:
        """Read the book, whose lock must be held.

        Args:
            prompt_tokens: of the request that asks, where nothing generates beside it: then they are all in one step.

        Raises:
            NotReady: the model has seen too little.
        """
        self.sizes = sizes
        self.in_flight = book.in_flight
        self.decoding = min(book.decoding, sizes.max_running - 1)
        self.waiting_prompt_tokens = book.waiting_prompt_tokens
        self.remaining_tokens = book.remaining_tokens
        rows = min(self.in_flight, sizes.max_running - 1)
        adapters = book.adapters
        context = book.context_tokens + book.waiting_prompt_tokens
        self.chunk = sizes.max_batch_tokens - self.decoding
        if self.decoding:
            entering = min(self.in_flight + 1, sizes.max_running) - self.decoding
            self.chunk = min(self.chunk, sizes.prefill_chunk_tokens * entering + self.decoding)
        chunk = self.chunk if self.decoding else min(self.chunk, max(1, book.waiting_prompt_tokens + prompt_tokens))

        def step(decode_rows: int, tokens: int) -> StepTime:
            time = model.step_time(
                mode, decode_rows=decode_rows, prefill_tokens=tokens, context_tokens=context, adapters=adapters
            )
            if time is None:
                raise NotReady
            return time

        self.line = step(rows + 1, 0)
        before = step(self.decoding, 0) if self.decoding else StepTime(0.0)
        reading = step(self.decoding, chunk)
        columns, row_ranks = book.columns, book.row_ranks
        traffic = book.traffic(now)
        share = self.decoding / max(1, self.in_flight)
        now_s: Floats = before.fixed_s + before.per_column_s * columns + before.per_row_rank_s * share * row_ranks
        mean_ranks = row_ranks / self.in_flight if self.in_flight else traffic.ranks
        with_chunk = reading.fixed_s + reading.per_column_s * columns
        with_chunk = with_chunk + reading.per_row_rank_s * (share * row_ranks + chunk * mean_ranks)
        token_s: Floats = np.maximum(with_chunk - now_s, 0.0) / chunk
        current: Floats = self.line.fixed_s + self.line.per_column_s * columns + self.line.per_row_rank_s * row_ranks
        if traffic.new_tokens_per_s > 0:
            current = np.maximum(current, (current + self._settled(step(1, 0), traffic, rows, token_s)) / 2)
        self.now_s, self.token_s, self.gap_s = now_s, token_s, current

    def _settled(self, one: StepTime, traffic: Traffic, rows: int, token_s: Floats) -> Floats:
        """A step at the load that what arrives leads to. A slower step holds more requests, which make it slower still: by
        Little's law the rows are `arriving tokens * step`, so

            step = base + slope * tokens_per_s * step + reading_s * prompt_tokens_per_s * step

        where `base` is a step of one row and `slope` what each further row adds.
        """
        line = self.line
        distinct = min(1.0, traffic.adapters / max(4, rows))
        slope = max(0.0, line.fixed_s - one.fixed_s) / max(1, rows)
        added = slope + (line.per_row_rank_s + distinct * line.per_column_s) * traffic.ranks
        taken = traffic.new_tokens_per_s * added + traffic.prompt_tokens_per_s * token_s
        settled: Floats = one.fixed_s / np.maximum(1 - taken, _LEAST_FREE)
        return settled

    def reading_s(self, tokens: Floats) -> Floats:
        """Seconds until so many prompt tokens are read, at each price.

        Args:
            tokens: of each request.  # [requests, 1]
        """
        seconds: Floats = (np.ceil(tokens / self.chunk) + 0.5) * self.now_s + tokens * self.token_s
        return seconds

    def steps_to_read(self, tokens: int) -> float:
        """Steps until so many prompt tokens are read, from the middle of one on."""
        return -(-tokens // self.chunk) + 0.5


class NotReady(Exception):
    """Nothing can be predicted yet."""


class Outlook:
    """The times of one request, at each price for all and any rank of its own; none falls as the rank rises.

    Args:
        own_columns: those that requests in flight of its adapter use at each price; None where there are none.
        elapsed_s: since its arrival.
    """

    def __init__(self, prospect: Prospect, ask: Ask, own_columns: Floats | None, elapsed_s: float) -> None:
        self.prospect = prospect
        self.ask = ask
        self._own_columns = own_columns
        self._elapsed_ms = 1000 * elapsed_s
        self._tokens = prospect.waiting_prompt_tokens + ask.prompt_tokens
        self._steps = prospect.steps_to_read(self._tokens)
        missing = prospect.in_flight + 1 - prospect.sizes.max_running
        self._waiting_steps = 0.0
        """Steps that it waits for a place: requests end at the rate of Little's law."""
        if missing > 0:
            self._waiting_steps = missing * prospect.remaining_tokens / prospect.in_flight / prospect.sizes.max_running

    def at(self, level: int, rank: int, factor: float = 1.0) -> Times:
        """Its times from its arrival, in milliseconds, if all that is still to come takes longer than expected by a factor."""
        return self._times(level, rank, self.ask.new_tokens, factor)

    def soonest(self, level: int, rank: int) -> Times:
        """Its times if its answer is as short as it may be."""
        return self._times(level, rank, self.ask.least_tokens, 1.0)

    def _times(self, level: int, rank: int, tokens: int, factor: float) -> Times:
        prospect = self.prospect
        line = prospect.line
        columns = rank if self._own_columns is None else max(0.0, rank - float(self._own_columns[level]))
        gap_s = prospect.gap_s[level] + line.per_row_rank_s * rank + line.per_column_s * columns
        first_s = self._steps * prospect.now_s[level] + self._tokens * prospect.token_s[level] + self._waiting_steps * gap_s
        first_s += line.per_row_rank_s * rank * self.ask.prompt_tokens
        factor *= 1000
        first_ms = factor * first_s + self._elapsed_ms
        return Times(first_ms, factor * gap_s, first_ms + (tokens - 1) * factor * gap_s)
