"""The two bases that are made here, on the texts at hand: `python -m adapters.paper.bases --help`.

`causal` is a Llama of 11 million parameters, trained from nothing; `encoder` is MiniLM, 23 million, trained further. Neither
sees a task: meanings and sentences come apart, and no label is read.
"""

import argparse
import itertools
import sys
from collections.abc import Sequence
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch

from adapters.errors import AdapterError
from adapters.paper.causal_base import CausalRecipe
from adapters.paper.corpus import Source, read_corpus
from adapters.paper.encoder_base import EncoderRecipe
from adapters.paper.pretrained import BaseRecipe, Pretraining
from adapters.training.pretraining import PretrainSettings, pretrain

HELD_OUT_BATCHES = 8


class BaseName(StrEnum):
    """The folders that the bases are written to."""

    CAUSAL = "causal"
    ENCODER = "encoder"


RECIPES: dict[BaseName, BaseRecipe] = {
    BaseName.CAUSAL: CausalRecipe(
        PretrainSettings(steps=360, checkpoint_steps=20, bf16=True),
        shares=dict.fromkeys(Source, 1),
        hidden_size=320,
        intermediate_size=864,
        layers=8,
        heads=5,
        max_tokens=512,
        row_tokens=256,
        batch_tokens=4096,
    ),
    BaseName.ENCODER: EncoderRecipe(
        # Far below what weights from nothing take: what it knows is to stay.
        PretrainSettings(steps=200, matrix_learning_rate=3e-4, learning_rate=2e-4, weight_decay=0.0, bf16=True),
        # E2E is left out: 42,000 sentences on restaurants teach little that GLUE asks for.
        shares={Source.GLUE: 2, Source.WEBNLG: 1, Source.DART: 1},
        row_tokens=96,
        batch_tokens=3072,
    ),
}


def make_base(name: BaseName, data: Path, folder: Path, recipe: BaseRecipe) -> None:
    """Train one base and write it to `folder`, in fp32; goes on from a checkpoint there, and does nothing where all is done.

    Raises:
        DataError: a corpus under `data`, or what the base starts from, is missing, or isn't what it should be.
    """
    if (folder / "model.safetensors").exists():
        return
    corpus = read_corpus(data, recipe.shares)
    pretraining = recipe.pretraining(corpus)
    held_out = list(itertools.islice(pretraining.batches(corpus.held_out, 0), HELD_OUT_BATCHES))
    checkpoint = folder / "checkpoint.safetensors"
    pretrain(
        pretraining.model,
        pretraining.batches(corpus.groups, recipe.seed),
        pretraining.loss,
        lambda: _mean_loss(pretraining, held_out),
        recipe.settings,
        checkpoint,
        label=name,
    )
    loss = _mean_loss(pretraining, held_out)
    print(f"{name}: {pretraining.model.num_parameters():,} parameters, {loss:.3f} nats per held-out token", file=sys.stderr)
    pretraining.tokenizer.save_pretrained(folder)
    pretraining.model.save_pretrained(folder)
    checkpoint.unlink(missing_ok=True)


@torch.no_grad()
def _mean_loss(pretraining: Pretraining[Any], batches: Sequence[Any]) -> float:
    pretraining.model.eval()
    losses = [pretraining.loss(batch).item() for batch in batches]
    pretraining.model.train()
    return sum(losses) / len(losses)


def main(arguments: Sequence[str] | None = None) -> int:
    """Train what is missing; returns the exit status."""
    parser = argparse.ArgumentParser(prog="adapters.paper.bases", description="Pretrain the bases of our own.")
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="the corpora, as adapters.paper reads them")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="one folder is made here for each base")
    parser.add_argument("--only", type=BaseName, choices=list(BaseName), help="default: both, one after the other")
    parser.add_argument("--steps", type=int, help="training steps, to try it out")
    parser.add_argument("--no-bf16", action="store_true", help="compute in float32: faster where the processor has no bfloat16")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    for name in [options.only] if options.only else BaseName:
        recipe = RECIPES[name]
        if options.steps is not None:
            recipe = replace(recipe, settings=replace(recipe.settings, steps=options.steps))
        if options.no_bf16:
            recipe = replace(recipe, settings=replace(recipe.settings, bf16=False))
        try:
            make_base(name, options.data, options.out / name, recipe)
        except AdapterError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
