"""How many tokens a request may have: what it asks for, against what the model and the server allow."""

from collections.abc import Sequence
from dataclasses import dataclass

from service.core import ModelFacts
from service.errors import InvalidRequest, PromptTooLong
from service.settings import Settings


@dataclass(frozen=True)
class TokenFields:
    """What a schema calls the fields that say how many tokens, for errors.

    Attributes:
        truncate: the one that shortens a prompt; "" where there is none.
    """

    prompt: str
    new_tokens: str
    least_new_tokens: str
    truncate: str


@dataclass(frozen=True)
class TokenLimits:
    """What the model and the server allow.

    Attributes:
        context: prompt and answer together.
        vocab_size: ids of tokens are below it; a tokenizer may know more of them than its model.
        longest_token: see `ModelFacts`.
        longest_prompt, most_new: None for no limit of their own.
    """

    context: int
    vocab_size: int
    longest_token: int | None = None
    longest_prompt: int | None = None
    most_new: int | None = None

    @classmethod
    def of(cls, settings: Settings, model: ModelFacts) -> "TokenLimits":
        """Those of a server."""
        return cls(
            model.max_context_tokens,
            model.vocab_size,
            model.longest_token,
            settings.max_prompt_tokens,
            settings.max_new_tokens_limit,
        )

    def new_tokens(self, prompt: Sequence[int], asked: int | None, default: int | None, least: int, fields: TokenFields) -> int:
        """How many tokens to generate at most, at least 1.

        Args:
            prompt: its token ids.
            asked: what the request says; None where it says nothing.
            default: what it then gets, no more than the server allows and the context leaves; None for all of that.
            least: how many it wants at least.

        Raises:
            InvalidRequest: the prompt is empty or has a token that the model has not, or too much is asked for.
            PromptTooLong: the prompt is.
        """
        prompt_tokens = len(prompt)
        if not prompt_tokens:
            raise InvalidRequest(fields.prompt, "holds no token for this model; give some text")
        self._check_longest(prompt_tokens, fields)
        if asked is not None and self.most_new is not None and asked > self.most_new:
            message = f"{asked} is above this server's limit; legal: 1 to {self.most_new}"
            raise InvalidRequest(fields.new_tokens, message)
        left = max(self.context - prompt_tokens, 1)
        new_tokens = asked or min(default or left, left, self.most_new or left)
        if new_tokens >= self.context:
            message = f"{new_tokens} leaves no prompt in the context of {self.context} tokens; legal: 1 to {self.context - 1}"
            raise InvalidRequest(fields.new_tokens, message)
        if prompt_tokens + new_tokens > self.context:
            hint = f", or set {fields.truncate} to at most {self.context - new_tokens}" if fields.truncate else ""
            raise PromptTooLong(
                fields.prompt,
                f"{prompt_tokens} prompt tokens and {fields.new_tokens} {new_tokens} make {prompt_tokens + new_tokens}, above "
                f"the context of {self.context} tokens; shorten the prompt, lower {fields.new_tokens}{hint}",
            )
        if least > new_tokens:
            message = f"{least} is above {fields.new_tokens} {new_tokens}; legal: 0 to {new_tokens}"
            raise InvalidRequest(fields.least_new_tokens, message)
        if max(prompt) >= self.vocab_size:
            unknown = next(token for token in prompt if token >= self.vocab_size)
            message = f"the model has no token {unknown}, which the prompt contains; legal: 0 to {self.vocab_size - 1}"
            raise InvalidRequest(fields.prompt, message)
        return new_tokens

    def check_text(self, text: str, fields: TokenFields) -> None:
        """Refuse what is certainly too long before it is tokenised, which takes a second for a megabyte.

        Raises:
            PromptTooLong: the prompt has too many tokens even if each of them is the vocabulary's longest.
        """
        if self.longest_token is None:
            return
        least = -(-len(text) // self.longest_token)
        self._check_longest(least, fields, "at least ")
        if least >= self.context:
            hint = f", or set {fields.truncate} to at most {self.context - 1}" if fields.truncate else ""
            message = f"at least {least} prompt tokens, above the context of {self.context} tokens; shorten the prompt{hint}"
            raise PromptTooLong(fields.prompt, message)

    def _check_longest(self, prompt_tokens: int, fields: TokenFields, at_least: str = "") -> None:
        if self.longest_prompt is not None and prompt_tokens > self.longest_prompt:
            message = (
                f"{at_least}{prompt_tokens} prompt tokens are above this server's limit; legal: 1 to {self.longest_prompt}"
            )
            raise PromptTooLong(fields.prompt, message)
