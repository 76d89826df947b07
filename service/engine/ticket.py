"""One request inside the engine: its sequence, its growing text, and when it is complete."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from adapters.adapter import Adapter
from service.core import (
    Alternative,
    EventSink,
    Finished,
    FinishReason,
    GenerationRequest,
    Mode,
    PromptToken,
    Token,
    TokenEvent,
    Usage,
)
from service.engine.sampling import Chosen
from service.engine.scheduler import Sequence
from service.engine.stops import AnswerText
from service.engine.text import TextStream
from service.engine.vocabulary import Vocabulary


@dataclass(eq=False)
class Ticket:
    """A request with all that the engine keeps for it.

    Attributes:
        vocabulary: the model's tokens.
        eos_ids: end-of-sequence tokens, none if the generation is to go on after them.
        submitted, scheduled, first_token: moments in seconds of one monotonic clock.
        has_columns: whether it counts as a user of its adapter's columns.
        modes: how the steps that made its tokens ran.
    """

    sequence: Sequence
    sink: EventSink
    adapter: Adapter | None
    vocabulary: Vocabulary
    eos_ids: frozenset[int]
    submitted: float
    scheduled: float | None = None
    first_token: float | None = None
    has_columns: bool = False
    modes: set[Mode] = field(default_factory=set)

    def __post_init__(self) -> None:
        sampling = self.request.sampling
        self._stream = TextStream(self.vocabulary, self.request.prompt_ids)
        self._answer = AnswerText(sampling.stop, include_stop=sampling.include_stop)

    @property
    def request(self) -> GenerationRequest:
        """What was asked."""
        return self.sequence.request

    def take(self, chosen: Chosen, mode: Mode, now: float) -> Iterator[TokenEvent | Finished]:
        """Take the next token: the event that tells of it, and the terminal one if the request is complete."""
        self.sequence.tokens.append(chosen.token_id)
        mode = mode if self.adapter is not None else Mode.BASE
        self.modes.add(mode)
        if self.first_token is None:
            self.first_token = now
        text, reason = self._extend(chosen.token_id)
        is_special = chosen.token_id in self.vocabulary.special_ids
        alternatives = tuple(self._alternative(*pair) for pair in chosen.alternatives)
        token = Token(chosen.token_id, text, chosen.logprob, is_special, alternatives)
        rank = self.sequence.choice.rank if self.sequence.choice is not None else 0
        yield TokenEvent(self.request.request_id, token, mode, is_last=reason is not None, rank=rank)
        if reason is not None:
            answer, usage = self._answer.text, self._usage(now)
            yield Finished(self.request.request_id, reason, answer, self._mode(), usage, self._prompt())

    def _extend(self, token_id: int) -> tuple[str, FinishReason | None]:
        """The text that may be told after one more token, and why it is the last, if it is."""
        sampling, generated = self.request.sampling, self.sequence.generated
        is_stop_token = token_id in sampling.stop_token_ids
        piece = "" if is_stop_token and not sampling.include_stop else self._stream.push(token_id)
        reason: FinishReason | None = None
        if token_id in self.eos_ids:
            reason = FinishReason.EOS_TOKEN
        elif is_stop_token:
            reason = FinishReason.STOP_SEQUENCE
        elif generated >= sampling.max_new_tokens:
            reason = FinishReason.LENGTH
        if reason is not None:
            piece += self._stream.flush()
        text, is_stopped = self._answer.push(piece, may_stop=generated >= sampling.min_new_tokens)
        if is_stopped:
            return text, FinishReason.STOP_SEQUENCE
        return (text if reason is None else text + self._answer.flush()), reason

    def _alternative(self, token_id: int, logprob: float) -> Alternative:
        is_special = token_id in self.vocabulary.special_ids
        return Alternative(token_id, self.vocabulary.text_of(token_id), logprob, is_special)

    def _prompt(self) -> tuple[PromptToken, ...]:
        """The prompt's tokens with their log-probabilities, if they were asked for."""
        if not self.request.sampling.prompt_logprobs:
            return ()
        logprobs, alternatives = self.sequence.prompt_logprobs, self.sequence.prompt_alternatives
        return tuple(
            PromptToken(
                token,
                self.vocabulary.text_of(token),
                logprob,
                token in self.vocabulary.special_ids,
                tuple(self._alternative(*pair) for pair in pairs),
            )
            for token, logprob, pairs in zip(self.request.prompt_ids, [None, *logprobs], [(), *alternatives], strict=True)
        )

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
