"""Conversations through the model's chat template: one example for each of the assistant's turns."""

from collections.abc import Sequence

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from adapters.data.example import Conversation, Corpus, Example
from adapters.errors import DataError
from adapters.training.encoding import end_of_text


def examples_of(corpus: Corpus, tokenizer: PreTrainedTokenizerBase) -> tuple[Example, ...]:
    """The corpus's examples, its conversations rendered.

    Raises:
        DataError: as `render` does, or the corpus is of labelled texts.
    """
    examples: list[Example] = []
    for item in corpus.items:
        if isinstance(item, Conversation):
            examples.extend(render(item, tokenizer))
        elif isinstance(item, Example):
            examples.append(item)
        else:
            raise DataError(f"{corpus.source}: labelled texts ({corpus.format}); expected prompts and completions, or text")
    return tuple(examples)


def render(conversation: Conversation, tokenizer: PreTrainedTokenizerBase) -> tuple[Example, ...]:
    """Render through the tokenizer's chat template: one Example for each of the assistant's turns, in order.

    The prompt is what the template makes of the turns before, with the opening of an answer; the completion is what the
    template adds for the turn, up to the end of its content, and what comes after that is the example's `end`. If that is
    nothing, it is the end-of-text token: the model has to learn where to stop.

    Raises:
        DataError: the tokenizer has no chat template, the template refuses the conversation, or it doesn't render a turn
            as a continuation of its prompt.
    """
    if not tokenizer.chat_template:
        raise DataError("the tokenizer has no chat template; expected one, to make text of conversations")
    turns = [{"role": message.role, "content": message.content} for message in conversation.messages]
    return tuple(_turn(turns, i, tokenizer) for i, turn in enumerate(turns) if turn["role"] == "assistant")


def _turn(turns: Sequence[dict[str, str]], i: int, tokenizer: PreTrainedTokenizerBase) -> Example:
    prompt = _rendered(turns[:i], tokenizer, add_generation_prompt=True)
    whole = _rendered(turns[: i + 1], tokenizer, add_generation_prompt=False)
    if not whole.startswith(prompt):
        raise DataError(
            f"turn {i + 1} of {_named(turns)}: the chat template doesn't render it as a continuation of the turns before: "
            f"expected {prompt[-80:]!r} before the answer"
        )
    added, content = whole[len(prompt) :], turns[i]["content"].strip()
    at = added.rfind(content)
    if at < 0:  # the template rewrites it, as some do with a chain of thought
        return Example(prompt, (added,), end="")
    completion, end = added[: at + len(content)], added[at + len(content) :]
    return Example(prompt, (completion,), end if end.strip() else _end_of_text(tokenizer))


def _rendered(turns: Sequence[dict[str, str]], tokenizer: PreTrainedTokenizerBase, *, add_generation_prompt: bool) -> str:
    try:
        text = tokenizer.apply_chat_template(list(turns), tokenize=False, add_generation_prompt=add_generation_prompt)
    except (TemplateError, TypeError, ValueError) as error:
        raise DataError(f"the chat template refuses {_named(turns)}: {error}") from error
    assert isinstance(text, str)
    return text


def _named(turns: Sequence[dict[str, str]]) -> str:
    return f"the conversation that starts {turns[0]['content'][:80]!r}"


def _end_of_text(tokenizer: PreTrainedTokenizerBase) -> str:
    end_of_text(tokenizer)
    return str(tokenizer.eos_token)
