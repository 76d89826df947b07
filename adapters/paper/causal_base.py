"""A causal base of our own: a Llama with tied embeddings and a byte-level BPE, on packed documents."""

import itertools
import random
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from adapters.paper.corpus import Corpus, Group
from adapters.paper.pretrained import BaseRecipe, Pretraining
from adapters.training.byte_bpe import train_byte_bpe

END = "<|end|>"


def causal_pretraining(corpus: Corpus, recipe: BaseRecipe) -> Pretraining[Tensor]:
    """Fresh weights and what trains them; a batch is [rows, block_tokens] token ids."""
    tokenizer = _tokenizer(corpus, recipe)
    torch.manual_seed(recipe.seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=recipe.hidden_size,
            intermediate_size=recipe.intermediate_size,
            num_hidden_layers=recipe.layers,
            num_attention_heads=recipe.heads,
            max_position_embeddings=recipe.max_tokens,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )

    def batches(groups: Sequence[Group], seed: int) -> Iterator[Tensor]:
        blocks = _packed_blocks(groups, tokenizer, recipe.row_tokens, seed)
        while True:
            yield torch.stack(list(itertools.islice(blocks, recipe.batch_tokens // recipe.row_tokens)))

    def loss(batch: Tensor) -> Tensor:
        value: Tensor = model(input_ids=batch, labels=batch).loss
        return value

    return Pretraining(model, tokenizer, batches, loss)


def _tokenizer(corpus: Corpus, recipe: BaseRecipe) -> PreTrainedTokenizerFast:
    # A completion follows its prompt after a space: count each text's first word with a space and without.
    texts = (text for group in corpus.groups for one in group for text in (one, " " + one))
    bpe = train_byte_bpe(texts, recipe.vocab_size, [END])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END, pad_token=END, model_max_length=recipe.max_tokens)


def _packed_blocks(
    groups: Sequence[Group], tokenizer: PreTrainedTokenizerFast, block_tokens: int, seed: int
) -> Iterator[Tensor]:
    """Endless blocks [block_tokens] of whole documents, reshuffled every epoch.

    A group is one document, a text a line. From the second line on the facts are told already, so the model learns to
    carry them over, which is what an adapter builds on.
    """
    rng = random.Random(seed)
    buffer: list[int] = []
    while True:
        for group in rng.sample(groups, len(groups)):
            text = "\n".join(rng.sample(group, len(group)))
            buffer += [*tokenizer(text, verbose=False)["input_ids"], tokenizer.eos_token_id]
            while len(buffer) >= block_tokens:
                yield torch.tensor(buffer[:block_tokens])
                buffer = buffer[block_tokens:]
