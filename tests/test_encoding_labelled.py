from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from adapters.data.example import LabelledText
from adapters.errors import DataError
from adapters.training.encoding import EncodedText, LabelledDataset, LabelledPad, encode_labelled

TEXTS = (LabelledText("a b c", 1), LabelledText("d", 0))
PAIRS = (LabelledText("a b c", 1, "d e"), LabelledText("d", 0, "a"))


@pytest.fixture
def tokenizer() -> Any:
    """Of words, with BERT's template: [PAD] 0, [CLS] 1, [SEP] 2, then a to e."""
    vocab = {word: i for i, word in enumerate(["[PAD]", "[CLS]", "[SEP]", "a", "b", "c", "d", "e"])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="[PAD]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", model_input_names=["input_ids", "token_type_ids", "attention_mask"]
    )


def test_texts_and_pairs_go_through_the_tokenizers_own_templates(tokenizer: Any) -> None:
    assert encode_labelled(TEXTS, tokenizer, 16) == [
        EncodedText((1, 3, 4, 5, 2), 1, (0, 0, 0, 0, 0)),
        EncodedText((1, 6, 2), 0, (0, 0, 0)),
    ]
    assert encode_labelled(PAIRS, tokenizer, 16) == [
        EncodedText((1, 3, 4, 5, 2, 6, 7, 2), 1, (0, 0, 0, 0, 0, 1, 1, 1)),
        EncodedText((1, 6, 2, 3, 2), 0, (0, 0, 0, 1, 1)),
    ]


def test_token_types_are_given_where_the_model_asks_for_them(tokenizer: Any) -> None:
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    encoded = encode_labelled(PAIRS, tokenizer, 16)
    assert [text.token_type_ids for text in encoded] == [None, None]
    dataset = LabelledDataset(encoded)
    assert LabelledPad(0)([dataset[0], dataset[1]]).keys() == {"input_ids", "labels", "attention_mask"}


def test_long_texts_lose_their_end_and_the_longer_of_a_pair_loses_first(tokenizer: Any) -> None:
    assert encode_labelled(TEXTS, tokenizer, 4)[0].input_ids == (1, 3, 4, 2)
    assert encode_labelled(PAIRS, tokenizer, 7)[0].input_ids == (1, 3, 4, 2, 6, 7, 2)
    assert encode_labelled(PAIRS, tokenizer, 5)[0].input_ids == (1, 3, 2, 6, 2)


def test_what_cannot_be_encoded_is_refused(tokenizer: Any) -> None:
    with pytest.raises(DataError, match="at most 4 tokens; expected at least 5"):
        encode_labelled(PAIRS, tokenizer, 4)
    with pytest.raises(DataError, match="at most 2 tokens; expected at least 3"):
        encode_labelled(TEXTS, tokenizer, 2)
    with pytest.raises(DataError, match="1 of 2 texts are pairs"):
        encode_labelled((TEXTS[0], PAIRS[0]), tokenizer, 16)


def test_a_batch_is_padded_to_its_longest_and_read_by_a_classifier(tokenizer: Any) -> None:
    dataset = LabelledDataset(encode_labelled(PAIRS, tokenizer, 16))
    batch = LabelledPad(pad_token_id=0)([dataset[i] for i in range(len(dataset))])
    assert batch["input_ids"].tolist() == [[1, 3, 4, 5, 2, 6, 7, 2], [1, 6, 2, 3, 2, 0, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1] * 8, [1] * 5 + [0] * 3]
    assert batch["token_type_ids"].tolist() == [[0, 0, 0, 0, 0, 1, 1, 1], [0, 0, 0, 1, 1, 0, 0, 0]]
    assert batch["labels"].tolist() == [1, 0]
    config = BertConfig(
        vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, num_labels=2
    )
    assert BertForSequenceClassification(config)(**batch).loss.isfinite()
