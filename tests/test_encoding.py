import pytest
from transformers import AutoTokenizer

from adapters.data.example import Example
from adapters.demo import ARTIFACTS
from adapters.errors import DataError
from adapters.training.encoding import IGNORED, EncodedPair, LikeLengths, PairDataset, RightPad, encode

EXAMPLES = (
    Example("name[Aromi], area[riverside]", (" Aromi is by the river.", " By the river: Aromi.")),
    Example("name[B]", (" B.",)),
)


def test_a_pair_is_the_prompt_alone_then_the_completion_and_the_end() -> None:
    tokenizer = AutoTokenizer.from_pretrained(ARTIFACTS / "base")
    pairs = encode(EXAMPLES, tokenizer)
    assert [tokenizer.decode(pair.prompt) for pair in pairs] == [EXAMPLES[0].prompt, EXAMPLES[0].prompt, "name[B]"]
    assert tokenizer.decode(pairs[2].completion[:-1]) == " B."
    assert all(pair.completion[-1] == tokenizer.eos_token_id for pair in pairs)
    with pytest.raises(DataError, match="expected at most 8"):
        encode(EXAMPLES, tokenizer, max_tokens=8)


def test_labels_ignore_the_prompt_and_the_padding() -> None:
    dataset = PairDataset([EncodedPair((5, 6), (7, 1)), EncodedPair((8,), (1,))])
    batch = RightPad(pad_token_id=0)([dataset[0], dataset[1]])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 1], [8, 1, 0, 0]]
    assert batch["labels"].tolist() == [[IGNORED, IGNORED, 7, 1], [IGNORED, 1, IGNORED, IGNORED]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]


def test_an_epoch_takes_every_pair_once_in_batches_of_like_length_and_its_own_order() -> None:
    lengths = [(i * 37) % 50 for i in range(203)]
    sampler = LikeLengths(lengths, batch_size=4, seed=1)
    first = list(sampler)
    assert sorted(first) == list(range(203)) and first == list(sampler)
    spreads = [max(b) - min(b) for b in (tuple(lengths[i] for i in first[j : j + 4]) for j in range(0, 200, 4))]
    assert sum(spreads) / len(spreads) < 5
    means = [sum(lengths[i] for i in first[j : j + 4]) / 4 for j in range(0, 200, 4)]
    assert means != sorted(means) and means != sorted(means, reverse=True)
    sampler.set_epoch(1)
    assert sorted(sampler) == sorted(first) and list(sampler) != first
