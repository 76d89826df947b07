"""How long the next steps will take, and a request among them, at each price of a column: the latency model's steps, put
together as the scheduler does it.

Everything that does not depend on who asks is computed once after a step or an arrival: for all prices at once where a price is
set, and for one price at a time where a single request asks, which looks at few of them. A request then takes a few sums.
"""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, TypeVar

import numpy as np

from service.core import Mode
from service.prefill import prompt_tokens_beside
from service.rank.ladder import Floats
from service.rank.latency_model import LatencyModel, StepTime
from service.rank.load import LoadBook
from service.slo import Times

_A_MOMENT = 1e-9
_NONE: Floats = np.zeros(0)
Some = TypeVar("Some", float, Floats)
"""At one price, or at each."""


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
    """The steps that come next with what is in flight, if they run in this mode.

    A step takes `base_s`, `row_s` for each request that generates in it, and `token_s` for each prompt token. A request begins
    to generate when its prompt is read, and beyond the engine's places when another has ended; it then takes part in as many
    steps as it has tokens left. So what is in flight shrinks as its requests end, and by the end of some steps each has taken
    part in as many of them as lie between its own begin and its end. What arrives meanwhile makes them longer.

    Attributes:
        in_flight: number of requests.
        requests: they, in the order in which they came.
        starts, ends: steps until each has its first token, and its last.  # [requests]
        base_s: seconds of a step without any.
        row_s: what one that generates adds, at each price; its share of the columns is in it.
        row_fixed_s: of that, what does not depend on ranks.
        token_s: what a prompt token adds, at each price.
        full_s: a step in which all generate, and one more, at each price.
        line: of that step, for what the rank of one request adds.
        prompt_tokens_per_s: that arrive.
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
        self.in_flight = book.in_flight
        self.requests = list(book.requests)
        self._places = sizes.max_running
        self._unread = book.waiting_prompt_tokens
        self._traffic = book.traffic(now)
        self._new_tokens = self._traffic.new_tokens
        self.prompt_tokens_per_s = self._traffic.prompt_tokens_per_s
        decoding = min(book.decoding, sizes.max_running - 1)
        self._current = 0.5 if decoding else 0.0  # of the step that runs: it is in its middle, as far as one knows
        self._chunk = sizes.max_batch_tokens - decoding
        if decoding:
            entering = min(self.in_flight + 1, sizes.max_running) - decoding
            self._chunk = min(self._chunk, prompt_tokens_beside(decoding, entering, sizes.prefill_chunk_tokens))
        chunk = self._chunk if decoding else min(self._chunk, max(1, self._unread + prompt_tokens))
        context, rows = book.context_tokens + self._unread, max(1, min(self.in_flight, sizes.max_running - 1))

        def step(decode_rows: int, tokens: int, share: float = 1.0) -> StepTime:
            time = model.step_time(
                mode,
                decode_rows=decode_rows,
                prefill_tokens=tokens,
                context_tokens=share * context,
                adapters=math.ceil(share * book.adapters),
            )
            if time is None:
                raise NotReady
            return time

        self._rows = rows
        self.line = line = step(rows + 1, 0)
        self.row_fixed_s = max(0.0, line.fixed_s - step(1, 0, 1 / rows).fixed_s) / rows
        self.base_s = max(0.0, line.fixed_s - (rows + 1) * self.row_fixed_s)
        self._columns, self._row_ranks = book.columns, book.row_ranks  # which the book replaces, and never changes
        self._decoding, self._reading, self._read_tokens = decoding, step(decoding, chunk), chunk
        remaining = [each.new_tokens - each.generated for each in self.requests]
        self.starts: Floats
        self._last = self._lay_out(remaining)
        self.ends: Floats = self.starts + np.array(remaining, dtype=np.float64) if remaining else _NONE

    @cached_property
    def row_s(self) -> Floats:
        """See the class."""
        return self._row_s(self._columns, self._row_ranks)

    @cached_property
    def full_s(self) -> Floats:
        """See the class."""
        return self.base_s + (self._rows + 1) * self.row_s

    @cached_property
    def token_s(self) -> Floats:
        """See the class."""
        ranks = self._row_ranks / self.in_flight if self.in_flight else self._traffic.ranks
        return np.maximum(self._token_s(self._columns, ranks, self.row_s), 0.0)

    def row_and_token_s(self, level: int) -> tuple[float, float]:
        """`row_s` and `token_s` at one price."""
        if "token_s" in self.__dict__:  # a price was set by them
            return self.row_s.item(level), self.token_s.item(level)
        columns, row_ranks = self._columns.item(level), self._row_ranks.item(level)
        rank = row_ranks / self.in_flight if self.in_flight else self._traffic.ranks.item(level)
        row_s = self._row_s(columns, row_ranks)
        return row_s, max(self._token_s(columns, rank, row_s), 0.0)

    def _row_s(self, columns: Some, row_ranks: Some) -> Some:
        line = self.line
        return self.row_fixed_s + (line.per_column_s * columns + line.per_row_rank_s * row_ranks) / max(1, self.in_flight)

    def _token_s(self, columns: Some, rank: Some, row_s: Some) -> Some:
        """By how much prompt tokens of this rank make a step longer that reads them, each; less than 0 is none."""
        reading = self._reading
        with_ranks = reading.per_column_s * columns + reading.per_row_rank_s * (self._decoding + self._read_tokens) * rank
        return (reading.fixed_s + with_ranks - self.base_s - self._decoding * row_s) / self._read_tokens

    def _lay_out(self, remaining: Sequence[int]) -> list[float]:
        """Set `starts`; the ends of the last that have a place, as a heap."""
        if not remaining:
            self.starts = _NONE
            return []
        last = [float(left) for each, left in zip(self.requests, remaining, strict=True) if each.generated]
        heapq.heapify(last)
        starts, ahead = [], 0
        for each, left in zip(self.requests, remaining, strict=True):
            start = 0.0
            if not each.generated:
                ahead += each.prompt_tokens
                start = self._start(ahead, each.prompt_tokens, last)
                if len(last) >= self._places:
                    heapq.heappop(last)
                heapq.heappush(last, start + left)
            starts.append(start)
        self.starts = np.array(starts, dtype=np.float64)
        return last

    def _start(self, ahead: int, prompt_tokens: int, last: Sequence[float]) -> float:
        """Steps until the first token of one that waits.

        Args:
            ahead: prompt tokens up to the end of its own.
            last: as `_lay_out` gives them.
        """
        start = self._steps_to_read(ahead)
        return start if len(last) < self._places else max(start, last[0] + self._steps_to_read(prompt_tokens))

    def _steps_to_read(self, tokens: int) -> float:
        return -(-tokens // self._chunk) + self._current

    def start(self, prompt_tokens: int) -> float:
        """Steps until the first token of a request that comes now."""
        return self._start(self._unread + prompt_tokens, prompt_tokens, self._last)

    def work(self, steps: Floats) -> "Work":
        """What is done in the next steps.

        Args:
            steps: several numbers of them.  # [any, 1]
        """
        part: Floats = np.maximum(np.minimum(self.ends, steps) - self.starts, 0.0).sum(1, keepdims=True)
        most = np.minimum(steps, self._new_tokens)
        arriving = self._traffic.requests_per_s * most * (1 - most / np.maximum(2 * steps, _A_MOMENT))
        return Work(steps, part, np.minimum(self._unread, self._chunk * steps), arriving)

    def work_until(self, steps: float, prompt_tokens: int) -> tuple[float, float, float, float]:
        """The same of one number of steps, with a prompt that comes now."""
        part = float(np.maximum(np.minimum(self.ends, steps) - self.starts, 0.0).sum()) if self.requests else 0.0
        most = min(steps, self._new_tokens)
        arriving = self._traffic.requests_per_s * most * (1 - most / max(2 * steps, _A_MOMENT))
        return steps, part, min(self._unread + prompt_tokens, self._chunk * steps), arriving

    def seconds(self, work: "Work") -> Floats:
        """How long it takes, at each price, if as much arrives meanwhile as lately."""
        present = self.base_s * work.steps + work.part * self.row_s + work.read * self.token_s
        # Those who come because it takes longer are not counted: in a burst they would have no end, and it has.
        slowdown = 1 + work.arriving * self.row_s + self.prompt_tokens_per_s * self.token_s
        seconds: Floats = present * slowdown
        return seconds


class Work(NamedTuple):
    """What is done in some steps, several times.  # [any, 1]

    Attributes:
        steps: their number.
        part: those that the requests in flight take part in, all together.
        read: prompt tokens.
        arriving: steps that those take part in who come in a second: half in the mean, less where answers are shorter.
    """

    steps: Floats
    part: Floats
    read: Floats
    arriving: Floats


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
        self._start = prospect.start(ask.prompt_tokens)
        self._first = self._until(1)
        self._last = self._until(ask.new_tokens)
        self._known: dict[tuple[int, int, float], Times] = {}  # a decision comes back to some
        self._least = self._first if ask.least_tokens == 1 else self._until(ask.least_tokens)

    def _until(self, tokens: int) -> "_Until":
        return tokens, *self.prospect.work_until(self._start + tokens - 1, self.ask.prompt_tokens)

    def at(self, level: int, rank: int, factor: float = 1.0) -> Times:
        """Its times from its arrival, in milliseconds, if all that is still to come takes longer than expected by a factor."""
        key = level, rank, factor
        known = self._known.get(key)
        if known is None:
            known = self._known[key] = self._times(level, rank, self._last, factor)
        return known

    def soonest(self, level: int, rank: int) -> Times:
        """Its times if its answer is as short as it may be."""
        return self._times(level, rank, self._least, 1.0)

    def _times(self, level: int, rank: int, last: "_Until", factor: float) -> Times:
        prospect, line = self.prospect, self.prospect.line
        base_s, (row_s, token_s) = prospect.base_s, prospect.row_and_token_s(level)
        columns = rank if self._own_columns is None else max(0.0, rank - self._own_columns.item(level))
        rank_s = line.per_row_rank_s * rank
        own_s = prospect.row_fixed_s + rank_s + line.per_column_s * columns
        prompt_s = rank_s * self.ask.prompt_tokens
        slowdown = 1 + prospect.prompt_tokens_per_s * token_s
        factor_ms = 1000 * factor

        made, steps, part, read, arriving = self._first
        seconds = base_s * steps + row_s * part + token_s * read + prompt_s + own_s * made
        first_ms = last_ms = factor_ms * seconds * (slowdown + arriving * row_s)
        gap_ms = 0.0
        # An answer that may end with its first token has the gap of one that does not.
        made, steps, part, read, arriving = last if last[0] > 1 else self._last
        if made > 1:
            seconds = base_s * steps + row_s * part + token_s * read + prompt_s + own_s * made
            long_ms = factor_ms * seconds * (slowdown + arriving * row_s)
            gap_ms = (long_ms - first_ms) / (made - 1)
            if last[0] > 1:
                last_ms = long_ms
        return Times(first_ms + self._elapsed_ms, gap_ms, last_ms + self._elapsed_ms)


_Until = tuple[int, float, float, float, float]
"""What is done until a request has made so many tokens: their number, and the fields of `Work`."""
