"""Prompts between text and token ids, in the model's own tokenizer and chat template."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from threading import Lock

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from service.errors import InvalidRequest


class Prompts:
    """What one tokenizer makes of prompts, in any thread."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        # A fast tokenizer must not be changed while it reads. Its first text takes off the truncation and padding that its file
        # may name; from then on all texts are read with the same settings, and nothing is changed.
        tokenizer.encode("")
        self._turn: AbstractContextManager[object] = nullcontext() if tokenizer.is_fast else Lock()

    def encode(self, text: str, *, with_special: bool = True) -> tuple[int, ...]:
        """Token ids, with or without what the tokenizer puts around a text."""
        with self._turn:
            return tuple(self._tokenizer.encode(text, add_special_tokens=with_special))

    def chat_text(
        self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool, continue_final_message: bool
    ) -> str:
        """The prompt of a conversation, by the chat template.

        Raises:
            InvalidRequest: there is no chat template, or it refuses the conversation.
        """
        if not self._tokenizer.chat_template:
            raise InvalidRequest("messages", "this model has no chat template, so it can't chat; /v1/completions serves it")
        try:
            text = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise InvalidRequest("messages", f"the model's chat template refuses them: {error}") from None
        return str(text)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some tokens, without the special ones."""
        text = self._tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(text)
