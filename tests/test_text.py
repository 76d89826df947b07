"""Incremental text equals the text decoded at once, and stop strings are found wherever tokens end."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from service.engine.text import StopMatcher, TextStream

TEXT = "The quick brown fox — naïve café, 日本語のテキスト, and emoji 👩‍👩‍👧 😀 jump over  two   spaces\nand lines. " * 3


@pytest.fixture(scope="module")
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE so small that most characters beyond ASCII take several tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=["<eos>"], show_progress=False)
    tokenizer.train_from_iterator([TEXT], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


@given(text=st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=30), cut=st.integers(0, 8))
def test_pieces_join_to_the_whole_text(byte_tokenizer: PreTrainedTokenizerFast, text: str, cut: int) -> None:
    prompt, generated = byte_tokenizer.encode("a prompt: "[:cut]), byte_tokenizer.encode(text)
    stream = TextStream(byte_tokenizer, prompt)
    pieces = [stream.push(token) for token in generated]
    pieces.append(stream.flush())
    assert "".join(pieces) == stream.text == text
    assert not any("\ufffd" in piece for piece in pieces if "\ufffd" not in text)


def test_a_character_comes_with_the_token_that_completes_it(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    ids = byte_tokenizer.encode("🦜")
    assert len(ids) > 1
    stream = TextStream(byte_tokenizer, [])
    assert [stream.push(token) for token in ids] == [""] * (len(ids) - 1) + ["🦜"]


def test_bytes_that_are_no_text_are_let_go_in_the_end(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    first_byte = byte_tokenizer.encode("🦜")[0]
    stream = TextStream(byte_tokenizer, [])
    pieces = [stream.push(first_byte) for _ in range(20)] + [stream.flush()]
    assert "".join(pieces) == stream.text == "\ufffd" * 20


def test_special_tokens_have_no_text(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    eos = byte_tokenizer.eos_token_id
    stream = TextStream(byte_tokenizer, [eos])
    assert stream.push(eos) == ""
    assert stream.is_special(eos)


pieces_strategy = st.lists(st.text("abc", max_size=4), min_size=1, max_size=12)


@given(pieces=pieces_strategy, stops=st.lists(st.text("abc", min_size=1, max_size=5), min_size=1, max_size=3))
def test_stop_strings_are_found_as_soon_as_they_are_complete(pieces: list[str], stops: list[str]) -> None:
    matcher = StopMatcher(tuple(stops))
    text = ""
    for piece in pieces:
        text += piece
        end = matcher.end_of_match(text, len(piece))
        whole = [text.index(stop) + len(stop) for stop in stops if stop in text]
        assert end == (min(whole) if whole else None)
        if end is not None:
            return


def test_stop_text_may_cross_tokens_and_the_rest_of_the_last_token_is_cut() -> None:
    matcher = StopMatcher(("\n\n",))
    assert matcher.end_of_match("one\n", 1) is None
    assert matcher.end_of_match("one\n\ntwo", 4) == 5
