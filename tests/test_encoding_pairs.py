"""The seam between a prompt and its completion, plain text, and what is too long."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from adapters.data.example import Example
from adapters.errors import DataError
from adapters.training.encoding import EncodedPair, Shortened, encode, shorten


class Words:
    """A tokenizer of single letters, each text after <s>; with a space of its own before a text, as some have."""

    def __init__(self, merges: Sequence[tuple[str, str]] = (), prefix: bool = True) -> None:
        letters = ["<s>", "</s>", "▁", *"abcd", *("".join(merge) for merge in merges)]
        backend = Tokenizer(models.BPE({token: i for i, token in enumerate(letters)}, list(merges)))
        scheme = "always" if prefix else "never"
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
        backend.decoder = decoders.Metaspace(prepend_scheme=scheme)
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")

    def words(self, ids: Sequence[int]) -> str:
        return "".join(self.tokenizer.convert_ids_to_tokens(list(ids)))


def test_a_completion_gets_no_space_that_the_tokenizer_puts_before_a_text() -> None:
    of = Words()
    (pair,) = encode([Example("ab", (" cd",))], of.tokenizer)
    assert (of.words(pair.prompt), of.words(pair.completion)) == ("<s>▁ab", "▁cd</s>")


def test_no_token_straddles_the_seam() -> None:
    of = Words(merges=[("b", "c")], prefix=False)
    (pair,) = encode([Example("ab", ("cd",))], of.tokenizer)
    assert (of.words(pair.prompt), of.words(pair.completion)) == ("<s>ab", "cd</s>")


def test_plain_text_is_trained_from_its_first_token() -> None:
    of = Words()
    (pair,) = encode([Example("", ("ab",))], of.tokenizer)
    assert (of.words(pair.prompt), of.words(pair.completion), pair.is_text) == ("<s>", "▁ab</s>", True)


def test_without_an_end_of_text_token_nothing_is_encoded() -> None:
    tokenizer = Words().tokenizer
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="no end-of-text token"):
        encode([Example("ab", ("cd",))], tokenizer)


def test_long_completions_are_cut_and_long_prompts_dropped() -> None:
    pairs = [EncodedPair((1, 2), (3, 4, 9)), EncodedPair((1, 2, 3, 4), (5, 9)), EncodedPair((1,), (2, 3, 9))]
    assert shorten(pairs, 4) == Shortened([EncodedPair((1, 2), (3, 4)), pairs[2]], cut=1, dropped=1)
    assert shorten(pairs, 6) == Shortened(pairs)
    with pytest.raises(DataError, match="no prompt leaves room for a completion within 4 tokens"):
        shorten(pairs[1:2], 4)
    with pytest.raises(DataError, match="at most 1 tokens; expected at least 2"):
        shorten(pairs, 1)


@given(st.lists(st.integers(), min_size=1), st.booleans(), st.integers(2, 9))
def test_every_token_of_a_long_text_is_trained_on_once_after_the_one_before_it(
    tokens: list[int], has_start: bool, max_tokens: int
) -> None:
    text = EncodedPair((0,) if has_start else (), tuple(tokens), is_text=True)
    result = shorten([text], max_tokens)
    assert [token for pair in result.pairs for token in pair.completion] == tokens
    assert all(len(pair.prompt) + len(pair.completion) <= max_tokens for pair in result.pairs)
    assert [pair.prompt for pair in result.pairs[1:]] == [pair.completion[-1:] for pair in result.pairs[:-1]]
    assert result.divided == (len(result.pairs) > 1)
