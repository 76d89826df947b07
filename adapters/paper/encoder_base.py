"""An encoder of our own: a pre-norm RoBERTa (arXiv 1907.11692, 2002.04745), lower-cased, trained by masked LM."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from tokenizers import normalizers, processors
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedTokenizerFast, RobertaPreLayerNormConfig, RobertaPreLayerNormForMaskedLM

from adapters.paper.corpus import Corpus, Group
from adapters.paper.pretrained import BaseRecipe, Pretraining
from adapters.training.byte_bpe import train_byte_bpe
from adapters.training.encoding import IGNORED

BEGIN, PAD, END, MASK = SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<mask>")

MASKED_SHARE, MASK_TOKEN_SHARE, RANDOM_TOKEN_SHARE = 0.15, 0.8, 0.1
"""Of all tokens 15% are to be told; of these 80% read `<mask>`, 10% a random token, 10% stand as they are (BERT)."""

POOL_BATCHES = 32
"""Rows of like length are sought in this many batches at a time."""


@dataclass(frozen=True)
class MaskedBatch:
    """Rows of texts with holes; all tensors are [rows, longest], `labels` IGNORED where nothing is asked."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor


def encoder_pretraining(corpus: Corpus, recipe: BaseRecipe) -> Pretraining[MaskedBatch]:
    """Fresh weights and what trains them."""
    tokenizer = _tokenizer(corpus, recipe)
    torch.manual_seed(recipe.seed)
    model = RobertaPreLayerNormForMaskedLM(
        RobertaPreLayerNormConfig(
            vocab_size=len(tokenizer),
            hidden_size=recipe.hidden_size,
            intermediate_size=recipe.intermediate_size,
            num_hidden_layers=recipe.layers,
            num_attention_heads=recipe.heads,
            # RoBERTa counts positions from pad_token_id + 1 on.
            max_position_embeddings=recipe.max_tokens + tokenizer.pad_token_id + 1,
            type_vocab_size=1,
            # The masks are drawn anew in each epoch, and there are few epochs: nothing is learnt by heart.
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            bos_token_id=tokenizer.bos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            attn_implementation="eager",  # rows are short, where torch's fused attention is slower on a CPU
        )
    )

    def batches(groups: Sequence[Group], seed: int) -> Iterator[MaskedBatch]:
        generator = torch.Generator().manual_seed(seed)
        return (masked(rows, tokenizer, generator) for rows in _like_length_rows(groups, tokenizer, recipe, seed))

    def loss(batch: MaskedBatch) -> Tensor:
        hidden = model.base_model(batch.input_ids, attention_mask=batch.attention_mask)[0]  # [rows, longest, hidden]
        asked = batch.labels != IGNORED
        logits = model.lm_head(hidden[asked])  # [asked, vocab]: the head runs only where something is asked
        return functional.cross_entropy(logits, batch.labels[asked])

    return Pretraining(model, tokenizer, batches, loss)


def masked(rows: Sequence[Sequence[int]], tokenizer: PreTrainedTokenizerFast, generator: torch.Generator) -> MaskedBatch:
    """Pad `rows` and hide tokens of them, never a special one."""
    longest = max(map(len, rows))
    ids = torch.tensor([[*row, *[tokenizer.pad_token_id] * (longest - len(row))] for row in rows])
    attention = ids != tokenizer.pad_token_id
    fates = torch.rand(3, *ids.shape, generator=generator)
    asked = (fates[0] < MASKED_SHARE) & (ids >= len(SPECIAL_TOKENS))
    random_ids = torch.randint(len(SPECIAL_TOKENS), len(tokenizer), ids.shape, generator=generator)
    read = torch.where(fates[1] < RANDOM_TOKEN_SHARE / (1 - MASK_TOKEN_SHARE), random_ids, ids)
    read = torch.where(fates[2] < MASK_TOKEN_SHARE, tokenizer.mask_token_id, read)
    return MaskedBatch(torch.where(asked, read, ids), attention.long(), torch.where(asked, ids, IGNORED))


def _tokenizer(corpus: Corpus, recipe: BaseRecipe) -> PreTrainedTokenizerFast:
    # Every text starts a sequence, but most words do not: count each text's first word with a space and without.
    texts = (text.lower() for group in corpus.groups for one in group for text in (one, " " + one))
    bpe = train_byte_bpe(texts, recipe.vocab_size, SPECIAL_TOKENS)
    bpe.normalizer = normalizers.Lowercase()
    ids = {token: number for number, token in enumerate(SPECIAL_TOKENS)}
    bpe.post_processor = processors.RobertaProcessing((END, ids[END]), (BEGIN, ids[BEGIN]), add_prefix_space=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BEGIN,
        cls_token=BEGIN,
        pad_token=PAD,
        eos_token=END,
        sep_token=END,
        mask_token=MASK,
        model_max_length=recipe.max_tokens,
    )


def _like_length_rows(
    groups: Sequence[Group], tokenizer: PreTrainedTokenizerFast, recipe: BaseRecipe, seed: int
) -> Iterator[list[list[int]]]:
    """Endless batches of encoded rows of like length, padded at most `batch_tokens`; reshuffled every epoch.

    A row is a text, or two of one group: as the classifier will read a sentence or a pair.
    """
    rng = random.Random(seed)
    pool: list[list[int]] = []
    while True:
        for group in rng.sample(groups, len(groups)):
            texts = rng.sample(group, len(group))
            for first in range(0, len(texts), 2):
                pair = texts[first : first + 2]
                pool.append(tokenizer(*pair, truncation=True, max_length=recipe.row_tokens)["input_ids"])
            if sum(map(len, pool)) >= POOL_BATCHES * recipe.batch_tokens:
                batches = _cut(sorted(pool, key=len), recipe.batch_tokens)
                rng.shuffle(batches)
                yield from batches
                pool = []


def _cut(by_length: Sequence[list[int]], batch_tokens: int) -> list[list[list[int]]]:
    """Consecutive rows, as many to a batch as fit once they are padded."""
    batches: list[list[list[int]]] = [[]]
    for row in by_length:
        if len(row) * (len(batches[-1]) + 1) > batch_tokens:
            batches.append([])
        batches[-1].append(row)
    return batches
