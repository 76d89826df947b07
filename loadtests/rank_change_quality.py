"""What a change of rank in the middle of an answer costs in quality, on the demo's adapters and real texts.

Each text is read as prompt and first half at one rank, then its second half at another, over the keys and values of the first.
One JSON line per adapter and pair of ranks: the loss of the second half's tokens, and their divergence from the full rank
throughout (Kullback-Leibler, nats per token), beside those of one rank throughout. `regret` is what a change loses against
having had the second rank from the beginning: negative where the keys and values of the higher rank help.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from adapters.checkpoint import read_peft
from adapters.data.e2e import read_e2e, spaced
from adapters.evaluation.attach import AttachedAdapter
from service.demo import demo_adapter_folders

BASE = demo_adapter_folders()[0].parent.parent / "base"
ADAPTERS = ("mr-to-text", "mr-to-text-lora")


def main() -> None:
    """Measure every adapter."""
    options = _options()
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    texts = []
    for example in spaced(read_e2e(options.e2e))[: options.texts]:
        prompt, answer = (
            tokenizer(text, add_special_tokens=False).input_ids for text in (example.prompt, example.completions[0])
        )
        texts.append((torch.tensor([prompt + answer + [tokenizer.eos_token_id]]), len(prompt) + len(answer) // 2))
    for folder in demo_adapter_folders():
        if folder.name in ADAPTERS:
            _measure(folder, texts, options.ranks)


def _measure(folder: Path, texts: list[tuple[Tensor, int]], ranks: list[int]) -> None:
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32).eval()
    attached = AttachedAdapter(model, read_peft(folder))
    full = attached.adapter.config.r_max
    pairs = {
        (full, full),
        *((rank, rank) for rank in ranks),
        *((full, rank) for rank in ranks),
        *((rank, full) for rank in ranks),
    }
    losses: dict[tuple[int, int], float] = defaultdict(float)
    divergences: dict[tuple[int, int], float] = defaultdict(float)
    tokens = 0
    for ids, half in texts:
        found = {pair: _second_half(model, attached, ids, half, *pair) for pair in pairs}
        wanted = ids[0, half + 1 :]
        reference = found[full, full]
        tokens += len(wanted)
        for pair, logprobs in found.items():
            losses[pair] -= float(logprobs.gather(1, wanted[:, None]).sum())
            divergences[pair] += float((reference.exp() * (reference - logprobs)).sum())
    for first, second in sorted(pairs):
        figures = {
            "loss": losses[first, second] / tokens,
            "divergence": divergences[first, second] / tokens,
            "regret": (losses[first, second] - losses[second, second]) / tokens,
        }
        rounded = {name: round(value, 4) for name, value in figures.items()}
        print(json.dumps({"adapter": folder.name, "first": first, "second": second, "tokens": tokens, **rounded}), flush=True)


def _second_half(model: PreTrainedModel, attached: AttachedAdapter, ids: Tensor, half: int, first: int, second: int) -> Tensor:
    """Log-probabilities of every token in the place of those after `half`.  # [tokens, vocabulary]"""
    with torch.inference_mode():
        attached.select(first)
        cache = model(ids[:, :half], use_cache=True).past_key_values
        attached.select(second)
        logits = model(ids[:, half:-1], past_key_values=cache, use_cache=True).logits[0]
    logprobs: Tensor = logits.float().log_softmax(-1)
    return logprobs


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m loadtests.rank_change_quality", description=__doc__)
    parser.add_argument("--e2e", type=Path, required=True, help="E2E's devset.csv")
    parser.add_argument("--texts", type=int, default=200, help="one for each meaning (default 200)")
    parser.add_argument(
        "--ranks", type=lambda text: [int(part) for part in text.split(",")], default=[1, 2, 4, 8], help="lower ranks (1,2,4,8)"
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
