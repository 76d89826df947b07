"""Make the demo's artifacts from the E2E corpus: `python -m adapters.demo.recipe --e2e DIR`.

DIR holds trainset.csv and devset.csv of the E2E NLG challenge. `--only base` (or an adapter's name, or quality) makes
one part, `--out` writes elsewhere than into the package, and `--work` keeps checkpoints, from which a run that was
stopped goes on. An adapter needs the base; its quality is measured as soon as it is trained.

On two cores of a server CPU that other work kept busy, one thread each: the base took 24 minutes, mr-to-text 31,
text-to-mr 10, mr-to-text-lora 7, and measuring an adapter at 16 ranks 3 to 5. The base's fastest stretches ran at 2.4 s a
step, the adapters' at 0.6 to 0.8 s: left alone, expect about half of these times.
"""

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from adapters.checkpoint import QUALITY_FILE, read_peft, write_peft
from adapters.demo import ARTIFACTS, BASE_NAME
from adapters.demo.base import BaseRecipe, save_base, train_base
from adapters.demo.tasks import DYLORA, E2E, LORA_ALPHA, R_MAX, AdapterName, settings_of, task_of
from adapters.errors import AdapterError
from adapters.evaluation.attach import AttachedAdapter
from adapters.evaluation.completions import CompletionSet
from adapters.evaluation.measurement import measure as measure_ranks
from adapters.evaluation.report import report_of
from adapters.quality import QualityProfile
from adapters.training.encoding import encode
from adapters.training.stock_lora import train_stock_lora
from adapters.training.trainer import train_dylora

SHOWN_RANKS = (1, 2, 4, 8, 16)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the recipe; returns the exit status."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    try:
        corpus = E2E.read(options.e2e)
    except AdapterError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    parts = options.only or ["base", *AdapterName]
    with tempfile.TemporaryDirectory() as scratch, _stated("recipe"):
        work = options.work or Path(scratch)
        for part in parts:
            with _stated(part):
                make(part, corpus, options.out, work, options.steps)
    return 0


def make(part: str, corpus: E2E, out: Path, work: Path, steps: int | None = None) -> None:
    """Make one part: "base", "quality" (measure every adapter that is there again) or an adapter's name."""
    if part == "base":
        make_base(corpus, out, steps)
    elif part == "quality":
        for name in AdapterName:
            if adapter_folder(out, name).is_dir():
                measure(name, corpus, out)
    else:
        make_adapter(AdapterName(part), corpus, out, work, steps)
        measure(AdapterName(part), corpus, out)


def make_base(corpus: E2E, out: Path, steps: int | None = None) -> None:
    """Train the base and write it to `out`/base."""
    recipe = BaseRecipe() if steps is None else replace(BaseRecipe(), steps=steps)
    model, tokenizer, dev_loss = train_base(corpus.train, corpus.dev, recipe)
    save_base(model, tokenizer, out / "base")
    print(f"base: {model.num_parameters():,} parameters, {dev_loss:.3f} nats per token on dev")


def make_adapter(name: AdapterName, corpus: E2E, out: Path, work: Path, steps: int | None = None) -> None:
    """Train one adapter on the base in `out`/base and write it to `out`/adapters/<name>, in fp32."""
    model, tokenizer = load_base(out)
    pairs = encode(task_of(name, corpus).train, tokenizer, model.config.max_position_embeddings)
    settings, folder = settings_of(name, steps), adapter_folder(out, name)
    if name is AdapterName.MR_TO_TEXT_LORA:
        trained = train_stock_lora(model, pairs, R_MAX, LORA_ALPHA, settings, work / name, BASE_NAME)
        trained.save_pretrained(str(folder))
        (folder / "README.md").unlink(missing_ok=True)  # PEFT's blank model card
    else:
        adapter = train_dylora(model, pairs, DYLORA, settings, work / name, BASE_NAME, resume=True)
        write_peft(adapter, folder)
    shutil.rmtree(work / name, ignore_errors=True)


def measure(name: AdapterName, corpus: E2E, out: Path) -> QualityProfile:
    """Write quality.json beside the adapter, measured at every rank on what a server makes of the files."""
    model, tokenizer = load_base(out)
    folder, task = adapter_folder(out, name), task_of(name, corpus)
    attached = AttachedAdapter(model, read_peft(folder))
    data = CompletionSet(task.dev, tokenizer, task.metrics, loss_completions=2)
    measured = measure_ranks(model, attached.select, data, attached.adapter.config.ranks)
    profile = report_of(measured, title=name, source=task.source).profile
    profile.save(folder / QUALITY_FILE)
    for metric in profile.metrics:
        values = "  ".join(f"{rank}: {metric.values[rank]:.3f}" for rank in SHOWN_RANKS if rank in metric.values)
        print(f"{name}, {metric.name} at rank  {values}")
    return profile


def load_base(out: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The base as committed, in fp32."""
    folder = out / "base"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(folder)


def adapter_folder(out: Path, name: AdapterName) -> Path:
    """Where an adapter's files lie."""
    return out / "adapters" / name


@contextmanager
def _stated(what: str) -> Iterator[None]:
    started = time.monotonic()
    yield
    print(f"{what}: {(time.monotonic() - started) / 60:.1f} minutes", flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="adapters.demo.recipe", description="Make the demo's model and adapters.")
    parser.add_argument("--e2e", type=Path, required=True, metavar="DIR", help="folder of trainset.csv and devset.csv")
    parser.add_argument(
        "--only",
        action="append",
        choices=["base", "quality", *AdapterName],
        help="make this part only; may be given more than once",
    )
    parser.add_argument("--out", type=Path, default=ARTIFACTS, metavar="DIR", help="default: the package's artifacts")
    parser.add_argument("--work", type=Path, metavar="DIR", help="keep checkpoints here, and go on from them")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    parser.add_argument("--steps", type=int, help="training steps of each part, to try the recipe out")
    return parser


if __name__ == "__main__":
    sys.exit(main())
