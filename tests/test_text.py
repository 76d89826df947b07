"""Incremental text equals the text decoded at once, whatever the tokenizer and wherever its tokens cut a character."""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from service.engine.prompts import Prompts
from service.engine.text import TextStream
from service.engine.vocabulary import Spelling, Vocabulary, longest_token

TEXT = "The quick brown fox — naïve café, 日本語のテキスト, and emoji 👩‍👩‍👧 😀 jump over  two   spaces\nand lines. " * 3
SHARED = Path(__file__).resolve().parents[2] / "shared" / "models"
texts = st.text(
    st.one_of(
        st.sampled_from("abc xyz,.\n  ▁"),
        st.sampled_from("日本語のテキスト한국어"),
        st.sampled_from("👩‍👧😀🦜🇩🇪é\ufffd"),
        st.characters(codec="utf-8", exclude_categories=["Cs"]),
    ),
    max_size=30,
)


def byte_level() -> PreTrainedTokenizerFast:
    """A byte-level BPE so small that most characters beyond ASCII take several tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=["<eos>"], show_progress=False)
    tokenizer.train_from_iterator([TEXT], trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")
    made.add_tokens(["<|added für dich|>"])
    return made


def byte_fallback(strip: bool = True) -> PreTrainedTokenizerFast:
    """SentencePiece's kind, as Llama (`strip`) and Gemma have it: letters, spaces as ▁, and all other characters as bytes."""
    pieces = ["<unk>", "<eos>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcxyz,.", "▁a", "語"]
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, [("▁", "a")], byte_fallback=True))
    steps = [normalizers.Replace(" ", "▁")]
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), *steps] if strip else steps)
    ends = [decoders.Strip(" ", 1, 0)] if strip else []
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *ends])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>")


def word_pieces() -> PreTrainedTokenizerFast:
    """Tokens whose spaces depend on their neighbours."""
    pieces = ["<unk>", "<eos>", *"abcxyz,.", *(f"##{letter}" for letter in "abcxyz,.")]
    tokenizer = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>")


def shared(name: str) -> PreTrainedTokenizerFast:
    file = SHARED / name / "tokenizer.json"
    if not file.exists():
        pytest.skip(f"{file} is not here")
    return PreTrainedTokenizerFast(tokenizer_file=str(file), unk_token="<unk>" if name == "stories260K" else None)


BYTES: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "byte-level BPE": byte_level,
    "byte fallback, Llama": byte_fallback,
    "byte fallback, Gemma": lambda: byte_fallback(strip=False),
    "stories260K": lambda: shared("stories260K"),
    "GPT-2": lambda: shared("gpt2_tokenizer"),
}


@pytest.fixture(scope="module", params=BYTES)
def byte_vocabulary(request: pytest.FixtureRequest) -> Vocabulary:
    made = Vocabulary(BYTES[request.param]())
    assert made.spelling is not None
    return made


@pytest.fixture(scope="module")
def pieces_vocabulary() -> Vocabulary:
    made = Vocabulary(word_pieces())
    assert made.spelling is None
    return made


def stream_of(vocabulary: Vocabulary, prompt: list[int], generated: list[int]) -> list[str]:
    stream = TextStream(vocabulary, prompt)
    return [*(stream.push(token) for token in generated), stream.flush()]


@given(prompt=texts, text=texts)
def test_pieces_join_to_the_whole_text(byte_vocabulary: Vocabulary, prompt: str, text: str) -> None:
    tokenizer = byte_vocabulary.tokenizer
    before = tokenizer.encode(prompt)
    generated = tokenizer.encode(text, add_special_tokens=False)
    pieces = stream_of(byte_vocabulary, before, generated)
    assert "".join(pieces) == byte_vocabulary.decode(before + generated)[len(byte_vocabulary.decode(before)) :]
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


@given(prompt=st.text("abc xyz", max_size=10), text=st.text("abc, xyz.", max_size=30))
def test_pieces_of_neighbours_join_to_the_whole_text(pieces_vocabulary: Vocabulary, prompt: str, text: str) -> None:
    tokenizer = pieces_vocabulary.tokenizer
    before, generated = tokenizer.encode(prompt), tokenizer.encode(text)
    pieces = stream_of(pieces_vocabulary, before, generated)
    assert "".join(pieces) == pieces_vocabulary.decode(before + generated)[len(pieces_vocabulary.decode(before)) :]


@given(data=st.data())
def test_any_bytes_become_what_python_makes_of_them(byte_vocabulary: Vocabulary, data: st.DataObject) -> None:
    """Also where a model stops inside a character, or goes on with another one."""
    ids = st.integers(0, len(byte_vocabulary.tokenizer) - 1).filter(lambda token: token not in byte_vocabulary.special_ids)
    generated = data.draw(st.lists(ids, max_size=20))
    prompt = byte_vocabulary.tokenizer.encode("a", add_special_tokens=False)
    expected = b"".join(map(byte_vocabulary.bytes_of, generated)).decode(errors="replace")
    assert "".join(stream_of(byte_vocabulary, prompt, generated)) == expected


def test_a_character_comes_with_the_token_that_completes_it(byte_vocabulary: Vocabulary) -> None:
    ids = byte_vocabulary.tokenizer.encode("a🦜", add_special_tokens=False)
    pieces = stream_of(byte_vocabulary, [], ids)
    at = next(i for i, piece in enumerate(pieces) if "🦜" in piece)
    assert at == len(ids) - 1
    assert not any(piece.strip() for piece in pieces[at - 2 : at])


def test_the_first_space_is_dropped_only_where_the_text_begins() -> None:
    vocabulary = Vocabulary(byte_fallback())
    ids = vocabulary.tokenizer.encode("a a")
    eos = vocabulary.tokenizer.eos_token_id
    assert "".join(stream_of(vocabulary, [eos], ids)) == "a a"
    assert "".join(stream_of(vocabulary, ids, ids)) == " a a"


def test_special_tokens_have_no_text_but_can_be_written_out() -> None:
    vocabulary = Vocabulary(byte_level())
    eos = vocabulary.tokenizer.eos_token_id
    assert stream_of(vocabulary, [eos], [eos]) == ["", ""]
    assert vocabulary.text_of(eos) == "<eos>"
    added = vocabulary.tokenizer.convert_tokens_to_ids("<|added für dich|>")
    assert stream_of(vocabulary, [], [added])[0] == vocabulary.text_of(added) == "<|added für dich|>"


def test_ids_without_a_token_have_no_text(byte_vocabulary: Vocabulary) -> None:
    """A model may have more logits than its tokenizer has tokens."""
    assert stream_of(byte_vocabulary, [], [10**6]) == ["", ""]
    assert byte_vocabulary.text_of(10**6) == ""


def test_a_token_by_itself_has_its_spaces() -> None:
    vocabulary = Vocabulary(byte_fallback())
    assert vocabulary.text_of(vocabulary.tokenizer.convert_tokens_to_ids("▁a")) == " a"


@pytest.mark.parametrize(
    "decoder",
    [
        None,
        {"type": "WordPiece", "prefix": "##", "cleanup": True},
        {"type": "Sequence", "decoders": [{"type": "Fuse"}]},
        {"type": "Sequence", "decoders": [{"type": "ByteFallback"}]},
        {
            "type": "Sequence",
            "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 0, "stop": 1}],
        },
    ],
)
def test_decoders_of_another_kind_are_left_to_the_tokenizer(decoder: object) -> None:
    assert Spelling.of(json.loads(json.dumps(decoder))) is None


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
@given(text=texts)
def test_a_text_has_at_least_as_many_tokens_as_its_length_says(make: Callable[[], PreTrainedTokenizerFast], text: str) -> None:
    tokenizer = make()
    most = longest_token(tokenizer)
    assert most is not None
    for each in (text, 40 * " " + text, "<|added für dich|>" * 3, "e\u0301" * 9):
        assert len(each) <= most * len(tokenizer.encode(each, add_special_tokens=False))


@pytest.mark.parametrize("name", ["words", "strips", "unknown"])
def test_where_any_number_of_characters_may_vanish_the_length_says_nothing(name: str) -> None:
    if name == "words":
        assert longest_token(word_pieces()) is None
        return
    tokenizer = byte_level()
    if name == "strips":
        tokenizer.add_tokens([AddedToken("<mask>", lstrip=True)])
    else:
        tokenizer.backend_tokenizer.normalizer = normalizers.Strip()
    assert longest_token(tokenizer) is None


@pytest.mark.parametrize("make", [byte_level, byte_fallback, word_pieces])
def test_threads_that_read_at_once_get_what_one_gets_alone(make: Callable[[], PreTrainedTokenizerFast]) -> None:
    made = make()
    made.backend_tokenizer.enable_truncation(4)
    made.backend_tokenizer.enable_padding(length=9)
    prompts = Prompts(made)
    wanted = [TEXT[start:] for start in range(0, 200, 5)]
    alone = [prompts.encode(text) for text in wanted]
    assert len(alone[0]) > 9
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(prompts.encode, wanted * 10)) == alone * 10
