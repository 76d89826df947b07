"""Log-probabilities in OpenAI's two forms."""

from collections.abc import Iterable, Sequence

from service.core import Alternative, PromptToken, Token
from service.http.openai.answer_schemas import ChatLogprobs, CompletionLogprobs, TokenLogprob, TopLogprob


def completion_logprobs(tokens: Iterable[PromptToken | Token], count: int, offset: int = 0) -> CompletionLogprobs:
    """The form of completions: parallel lists.

    Args:
        count: how many of the most probable tokens to tell; 0 for none.
        offset: where the first token's text begins.
    """
    told = CompletionLogprobs(tokens=[], token_logprobs=[], top_logprobs=[] if count else None, text_offset=[])
    for token in tokens:
        text = "" if token.special else token.text
        told.tokens.append(text)
        told.token_logprobs.append(token.logprob)
        told.text_offset.append(offset)
        if told.top_logprobs is not None:
            told.top_logprobs.append(_top(token, text, count))
        offset += len(text)
    return told


def _top(token: PromptToken | Token, text: str, count: int) -> dict[str, float] | None:
    """The most probable tokens by their text and, as OpenAI has it, the chosen one where it is none of them."""
    if token.logprob is None:
        return None
    alternatives = token.alternatives[:count]
    top: dict[str, float] = {}
    for each in alternatives:
        top.setdefault(each.text, each.logprob)  # of several that look alike, the most probable
    if all(each.id != token.id for each in alternatives):
        top.setdefault(text, token.logprob)
    return top


def chat_logprobs(tokens: Sequence[Token], count: int) -> ChatLogprobs:
    """The form of chat completions: one object a token; `count` most probable tokens in each."""
    return ChatLogprobs(content=[_chat_token(token, count) for token in tokens])


def _chat_token(token: Token, count: int) -> TokenLogprob:
    top = [_told(each) for each in token.alternatives[:count]]
    return TokenLogprob(token=token.text, logprob=token.logprob, bytes=list(token.text.encode()), top_logprobs=top)


def _told(alternative: Alternative) -> TopLogprob:
    return TopLogprob(token=alternative.text, logprob=alternative.logprob, bytes=list(alternative.text.encode()))
