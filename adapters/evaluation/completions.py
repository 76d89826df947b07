"""Measuring a causal language model: the loss of right completions, and the texts it writes itself."""

from collections.abc import Sequence
from dataclasses import replace

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from adapters.data.example import Example
from adapters.errors import DataError
from adapters.evaluation.generation import GREEDY, Decoding, generate
from adapters.evaluation.loss import completion_losses
from adapters.evaluation.measurement import grouped_sums
from adapters.evaluation.metric import Metric, perplexity, ratio
from adapters.evaluation.resampling import Array
from adapters.evaluation.text_metrics import TextMetric
from adapters.training.encoding import EncodedPair, encode, shorten

LOSS = Metric("loss per completion token", False, ratio)
"""In nats, over the tokens of every completion, the end-of-text token among them."""
TEXT_LOSS = Metric("loss per token", False, ratio)
"""In nats, for plain text."""
PERPLEXITY = Metric("perplexity", False, perplexity)
"""exp of the loss."""


class CompletionSet:
    """Examples, encoded once: loss over all of their completions, and metrics of one generated text for each prompt.

    Attributes:
        metrics: the loss, which is the steadiest, then perplexity if asked for, then those of the texts.
        lost: see `EvaluationSet`.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        tokenizer: PreTrainedTokenizerBase,
        text_metrics: Sequence[TextMetric] = (),
        *,
        decoding: Decoding = GREEDY,
        batch_size: int = 32,
        max_tokens: int | None = None,
        loss_completions: int | None = None,
        with_perplexity: bool = False,
    ) -> None:
        """Encode `examples`.

        Args:
            examples: at least one.
            tokenizer: the model's.
            text_metrics: on generated texts; none, and no text is generated.
            decoding: how texts are generated.
            batch_size: rows of a forward pass.
            max_tokens: the model's positions. A longer plain text is measured in pieces; a completion that doesn't fit
                behind its prompt is left out, and an example with it that has no other, or no room for a generated text.
            loss_completions: take only so many completions of each example for the loss.
            with_perplexity: report it beside the loss.

        Raises:
            DataError: no example fits in `max_tokens`.
        """
        measured = [replace(e, completions=e.completions[:loss_completions]) for e in examples]
        whole = [encode([example], tokenizer) for example in measured]
        new_tokens = decoding.max_new_tokens if text_metrics else 0
        fitting = [_fitting(pairs, max_tokens, new_tokens) for pairs in whole]
        encoded = [pairs for pairs in fitting if pairs]
        if not encoded:
            raise _too_long(whole, max_tokens, new_tokens)
        examples = [example for example, pairs in zip(examples, fitting, strict=True) if pairs]
        self.lost = _lost(whole, fitting, max_tokens)
        self._pairs = [pair for pairs in encoded for pair in pairs]
        self._owner = [i for i, pairs in enumerate(encoded) for _ in pairs]
        self.prompts = [pairs[0].prompt for pairs in encoded]
        self._tokenizer, self._decoding, self._batch_size = tokenizer, decoding, batch_size
        self._counts = [metric.counter(examples) for metric in text_metrics]
        is_text = all(not example.prompt for example in examples)
        losses = (TEXT_LOSS if is_text else LOSS, *((PERPLEXITY,) if with_perplexity else ()))
        self.metrics = (*losses, *(each.metric for each in text_metrics))

    def __len__(self) -> int:
        return len(self.prompts)

    def statistics(self, model: PreTrainedModel) -> tuple[Array, ...]:
        """See `EvaluationSet.statistics`."""
        losses = grouped_sums(completion_losses(model, self._pairs, self._batch_size), self._owner, len(self))
        texts = generate(model, self._tokenizer, self.prompts, self._decoding, self._batch_size) if self._counts else []
        others = [count(texts) for count in self._counts]
        return (*[losses] * (len(self.metrics) - len(others)), *others)


def _fitting(pairs: list[EncodedPair], max_tokens: int | None, new_tokens: int) -> list[EncodedPair]:
    """The pairs of one example that the model reads whole; none where `new_tokens` behind the prompt would not fit."""
    if max_tokens is None:
        return pairs
    if pairs[0].is_text:
        return shorten(pairs, max_tokens).pairs
    if len(pairs[0].prompt) + new_tokens > max_tokens:
        return []
    return [pair for pair in pairs if len(pair.prompt) + len(pair.completion) <= max_tokens]


def _lost(whole: Sequence[list[EncodedPair]], fitting: Sequence[list[EncodedPair]], max_tokens: int | None) -> str:
    prompts = sum(not pairs for pairs in fitting)
    others = sum(max(0, len(before) - len(after)) for before, after in zip(whole, fitting, strict=True) if after)
    lost = [f"{count} {what}" for count, what in ((prompts, "of the prompts"), (others, "more of the completions")) if count]
    return f"{' and '.join(lost)} left out, too long for the model's {max_tokens} tokens" if lost else ""


def _too_long(encoded: Sequence[list[EncodedPair]], max_tokens: int | None, new_tokens: int) -> DataError:
    shortest = min(len(pairs[0].prompt) for pairs in encoded)
    if max_tokens is not None and 0 < max_tokens - shortest < new_tokens:
        return DataError(
            f"a prompt of {shortest} tokens, the shortest, and max_new_tokens of {new_tokens} are more than the model's "
            f"{max_tokens}; expected max_new_tokens of at most {max_tokens - shortest}"
        )
    return DataError(f"no prompt with its completion fits the model, which reads at most {max_tokens} tokens")
