"""One request inside the engine: its sequence, its growing text, and when it is complete."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from adapters.adapter import Adapter
from service.core import EventSink, Finished, FinishReason, GenerationRequest, Mode, Token, TokenEvent, Usage
from service.engine.sampling import Chosen
from service.engine.scheduler import Sequence
from service.engine.text import StopMatcher, TextStream


@dataclass(eq=False)
class Ticket:
    """A request with all that the engine keeps for it.

    Attributes:
        eos_ids: tokens that end the generation, none if it is to go on after them.
        submitted, scheduled, first_token: moments in seconds of one monotonic clock.
        has_columns: whether it counts as a user of its adapter's columns.
        modes: how the steps that made its tokens ran.
    """

    sequence: Sequence
    sink: EventSink
    adapter: Adapter | None
    stream: TextStream
    eos_ids: frozenset[int]
    submitted: float
    scheduled: float | None = None
    first_token: float | None = None
    has_columns: bool = False
    modes: set[Mode] = field(default_factory=set)

    @property
    def request(self) -> GenerationRequest:
        """What was asked."""
        return self.sequence.request

    def take(self, chosen: Chosen, mode: Mode, now: float) -> Iterator[TokenEvent | Finished]:
        """Take the next token: the event that tells of it, and the terminal one if the request is complete."""
        sampling = self.request.sampling
        self.sequence.tokens.append(chosen.token_id)
        self.modes.add(mode if self.adapter is not None else Mode.BASE)
        if self.first_token is None:
            self.first_token = now
        piece = self.stream.push(chosen.token_id)
        end = StopMatcher(sampling.stop).end_of_match(self.stream.text, len(piece))
        reason: FinishReason | None = None
        if end is not None:
            reason = FinishReason.STOP_SEQUENCE
            piece = piece[: len(piece) - (len(self.stream.text) - end)]
        elif chosen.token_id in self.eos_ids:
            reason = FinishReason.EOS_TOKEN
        elif self.sequence.generated >= sampling.max_new_tokens:
            reason = FinishReason.LENGTH
        if reason is not None and end is None:
            piece += self.stream.flush()
        token = Token(chosen.token_id, piece, chosen.logprob, self.stream.is_special(chosen.token_id))
        yield TokenEvent(self.request.request_id, token, mode if self.adapter is not None else Mode.BASE)
        if reason is not None:
            yield Finished(self.request.request_id, reason, self.stream.text[:end], self._mode(), self._usage(now))

    def _mode(self) -> Mode:
        return next(iter(self.modes)) if len(self.modes) == 1 else Mode.MIXED

    def _usage(self, now: float) -> Usage:
        scheduled = self.submitted if self.scheduled is None else self.scheduled
        first_token = now if self.first_token is None else self.first_token
        return Usage(
            prompt_tokens=len(self.request.prompt_ids),
            generated_tokens=self.sequence.generated,
            queue_s=scheduled - self.submitted,
            time_to_first_token_s=first_token - self.submitted,
            total_s=now - self.submitted,
        )
