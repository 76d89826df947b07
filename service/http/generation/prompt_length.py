"""Refuses what is certainly too long before it is tokenised, which takes a second for a megabyte and one text at a time."""

from service.core import ModelFacts
from service.errors import PromptTooLong
from service.http.generation.token_limits import TokenFields, TokenLimits


def check_length(text: str, model: ModelFacts, limits: TokenLimits, fields: TokenFields) -> None:
    """Raise PromptTooLong for a prompt that has too many tokens even if each of them is the vocabulary's longest."""
    if model.longest_token is None:
        return
    least = -(-len(text) // model.longest_token)
    if limits.longest_prompt is not None and least > limits.longest_prompt:
        legal = f"legal: 1 to {limits.longest_prompt}"
        raise PromptTooLong(fields.prompt, f"at least {least} prompt tokens are above this server's limit; {legal}")
    if least >= limits.context:
        hint = f", or set {fields.truncate} to at most {limits.context - 1}" if fields.truncate else ""
        message = f"at least {least} prompt tokens, above the context of {limits.context} tokens; shorten the prompt{hint}"
        raise PromptTooLong(fields.prompt, message)
