from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from adapters.data.example import Conversation, Corpus, Example, LabelledText, Message, Task
from adapters.demo import ARTIFACTS
from adapters.errors import DataError
from adapters.training.chat import examples_of, render
from adapters.training.encoding import encode, prompt_ids

CHATML = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m.role == 'user' %}{{ bos_token }}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}"
)
WITHOUT_END = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content.split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPLIT = "{% for m in messages %}({{ m.role }}) {{ m.content }}{% endfor %}{% if add_generation_prompt %}<answer>{% endif %}"

CONVERSATION = Conversation(
    (Message("user", "Who?"), Message("assistant", "I. "), Message("user", "Why?"), Message("assistant", "So.")),
)


@pytest.fixture
def tokenizer() -> Any:
    """Of bytes, with the special tokens of the templates, and <s> before every text."""
    specials = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*specials, *alphabet])}
    backend = Tokenizer(models.BPE(vocab, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=specials[2:],
        clean_up_tokenization_spaces=False,
    )


def test_every_turn_of_the_assistant_continues_the_template_of_what_came_before(tokenizer: Any) -> None:
    tokenizer.chat_template = CHATML
    first = "<s><|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n"
    second = first + "I.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    assert render(CONVERSATION, tokenizer) == (
        Example(first, ("I.",), end="<|im_end|>\n"),
        Example(second, ("So.",), end="<|im_end|>\n"),
    )


def test_a_template_may_open_no_answer(tokenizer: Any) -> None:
    tokenizer.chat_template = LLAMA2
    first, second = render(CONVERSATION, tokenizer)
    assert first == Example("<s>[INST] Who? [/INST]", (" I.",), end="  </s>")
    assert second == Example("<s>[INST] Who? [/INST] I.  </s><s>[INST] Why? [/INST]", (" So.",), end=" </s>")


@pytest.mark.parametrize("template", [CHATML, LLAMA2])
def test_special_tokens_are_those_of_the_template_and_no_more(tokenizer: Any, template: str) -> None:
    tokenizer.chat_template = template
    turns = [{"role": message.role, "content": message.content} for message in CONVERSATION.messages]
    examples = render(CONVERSATION, tokenizer)
    last = encode(examples, tokenizer)[-1]
    assert list(last.prompt) == tokenizer.apply_chat_template(turns[:-1], add_generation_prompt=True)["input_ids"]
    assert [*last.prompt, *last.completion] == tokenizer.apply_chat_template(turns)["input_ids"]
    assert prompt_ids(examples[-1], tokenizer) == last.prompt


def test_where_the_template_ends_no_turn_the_end_of_text_token_does(tokenizer: Any) -> None:
    tokenizer.chat_template = WITHOUT_END
    first, second = render(CONVERSATION, tokenizer)
    assert (first.end, second.end) == ("</s>", "</s>")
    assert second.prompt == "user: Who?\nassistant: I. \nuser: Why?\nassistant: "
    assert encode([second], tokenizer)[0].completion[-1] == tokenizer.eos_token_id
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="no end-of-text token"):
        render(CONVERSATION, tokenizer)


def test_a_turn_that_the_template_rewrites_is_taken_as_rewritten(tokenizer: Any) -> None:
    tokenizer.chat_template = THINKING
    conversation = Conversation((Message("user", "Who?"), Message("assistant", "<think>Hm</think>I.")))
    (example,) = render(conversation, tokenizer)
    assert (example.completions, example.end) == (("I.<|im_end|>\n",), "")


def test_a_conversation_that_cannot_be_rendered_is_refused_with_the_reason(tokenizer: Any) -> None:
    with pytest.raises(DataError, match="no chat template"):
        render(CONVERSATION, AutoTokenizer.from_pretrained(ARTIFACTS / "base"))
    tokenizer.chat_template = LLAMA2
    with pytest.raises(DataError, match=r"refuses the conversation that starts 'Be\.': roles must alternate"):
        render(Conversation((Message("system", "Be."), *CONVERSATION.messages)), tokenizer)
    tokenizer.chat_template = SPLIT
    with pytest.raises(DataError, match=r"turn 2 of .*'Who\?': .* doesn't render it as a continuation .*<answer>"):
        render(CONVERSATION, tokenizer)
    tokenizer.chat_template = "{% if %}"
    with pytest.raises(DataError, match="the chat template refuses"):
        render(CONVERSATION, tokenizer)


def test_a_corpus_gives_examples_unless_it_is_of_labelled_texts(tokenizer: Any) -> None:
    tokenizer.chat_template = CHATML
    chats = Corpus("messages", Task.CAUSAL_LM, (CONVERSATION, CONVERSATION))
    assert examples_of(chats, tokenizer) == render(CONVERSATION, tokenizer) * 2
    pairs = (Example("a", ("b",)),)
    assert examples_of(Corpus("prompt-completion", Task.CAUSAL_LM, pairs), tokenizer) == pairs
    labelled = Corpus("sst2", Task.CLASSIFICATION, (LabelledText("a", 0),), ("x", "y"), "dev.tsv, 1 texts")
    with pytest.raises(DataError, match=r"dev\.tsv, 1 texts: labelled texts \(sst2\); expected prompts"):
        examples_of(labelled, tokenizer)
