"""`dylora evaluate` on tiny models: as a process, from Python, for completions, for text and for classes."""

import argparse
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, RobertaConfig

from adapters.checkpoint import read_peft
from adapters.commands.evaluate import COMMAND, EvaluateOptions, evaluate
from adapters.data.example import Example
from adapters.demo import ARTIFACTS
from adapters.demo.recipe import load_base
from adapters.errors import AdapterError, DataError, IllegalRank, InvalidAdapter
from adapters.evaluation.attach import AttachedAdapter
from adapters.evaluation.completions import LOSS, CompletionSet
from adapters.evaluation.findings import Verdict
from adapters.evaluation.generation import Decoding, generate
from adapters.evaluation.measurement import Measurement, measure
from adapters.evaluation.names import MetricName
from adapters.evaluation.report import Report, report_of
from adapters.evaluation.report_table import markdown_table, text_table
from adapters.evaluation.text_metrics import BLEU
from adapters.quality import QualityProfile
from adapters.training.encoding import encode
from adapters.training.token_limit import max_tokens
from tests.checkpoints import edit_config
from tests.e2e.tiny_server import write_adapter, write_model

PAIRS = [
    ("the cat", " sat on the mat"),
    ("a rat", " sat"),
    ("the mat", " and then the cat there too"),
    ("on", " the rat sat"),
] * 2
WORDS = ("on", "the", "mat", "and", "then", "a", "rat", "too", "there", "sat")
TEXTS = [(f"the cat sat {word}", index % 3 == 0) for index, word in enumerate(WORDS)]


def lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a plain LoRA of rank 4 for it, a classifier's adapter, and data for all of them."""
    root = tmp_path_factory.mktemp("evaluate")
    write_model(root / "model")
    write_adapter(root / "lora", r=4)
    write_classifier(root / "model", root / "classifier")
    lines(root / "pairs.jsonl", [{"prompt": p, "completion": c} for p, c in PAIRS])
    lines(root / "text.jsonl", [{"text": p + c} for p, c in PAIRS])
    lines(root / "labels.jsonl", [{"text": text, "label": "yes" if label else "no"} for text, label in TEXTS])
    return root


def write_classifier(model: Path, out: Path) -> None:
    base = AutoModelForSequenceClassification.from_pretrained(model, num_labels=2, dtype=torch.float32)
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="SEQ_CLS")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        wrapped = get_peft_model(base, config)
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.data = 0.3 * torch.randn_like(parameter)
    wrapped.save_pretrained(str(out))


def run(folder: Path, data: str = "pairs.jsonl", adapter: str = "lora", **options: Any) -> Report:
    usual = {"model": str(folder / "model"), "max_new_tokens": 8, "resamples": 100, "device": "cpu"}
    return evaluate(folder / adapter, folder / data, **(usual | options))


def test_the_command_prints_a_table_and_writes_a_profile_that_a_server_reads_and_the_plots(folder: Path) -> None:
    arguments = ["--data", "pairs.jsonl", "--model", "model", "--ranks", "1-2", "--max-new-tokens", "8", "--resamples", "200"]
    done = subprocess.run(
        [sys.executable, "-m", "service.cli", "evaluate", "lora", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        env=env(),
    )
    assert done.returncode == 0, done.stderr
    table = [line.split()[0] for line in done.stdout.splitlines() if line]
    assert table[:6] == ["lora,", "rank", "base", "1", "2", "4"]
    assert "95% confidence intervals by bootstrap, 200 resamples of 8 examples, seed 0" in done.stdout
    assert "re-nested by SVD" in done.stdout
    assert [f"wrote lora/quality.{suffix}" in done.stderr for suffix in ("json", "png", "svg")] == [True] * 3
    profile = read_peft(folder / "lora").quality
    assert profile is not None and profile.examples == 8
    assert [metric.name for metric in profile.metrics] == [LOSS.name, "perplexity", "BLEU", "chrF", "ROUGE-L"]
    assert set(profile.primary.values) == set(profile.primary.intervals) == {1, 2, 4} and profile.primary.base is not None
    assert (folder / "lora" / "quality.png").read_bytes().startswith(b"\x89PNG")
    assert ">rank</text>" in (folder / "lora" / "quality.svg").read_text()


def env() -> dict[str, str]:
    root = str(Path(__file__).resolve().parent.parent)
    return {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def test_the_loss_at_full_rank_and_of_the_base_are_stock_pefts(folder: Path) -> None:
    report = run(folder, metrics=("perplexity",))
    loss, perplexity = report.metrics
    assert loss.by_rank[4].value == pytest.approx(stock_loss(folder, with_adapter=True), rel=1e-4)
    assert loss.base is not None
    assert loss.base.value == pytest.approx(stock_loss(folder, with_adapter=False), rel=1e-4)
    assert perplexity.by_rank[4].value == pytest.approx(2.718281828 ** loss.by_rank[4].value, rel=1e-6)
    assert all(estimate.low <= estimate.value <= estimate.high for estimate in loss.by_rank.values())


def stock_loss(folder: Path, *, with_adapter: bool) -> float:
    """Mean over tokens, one pair at a time."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    if with_adapter:
        model = PeftModel.from_pretrained(model, str(folder / "lora"))
    nats, tokens = 0.0, 0
    for pair in encode([Example(p, (c,)) for p, c in PAIRS], tokenizer):
        labels = [-100] * len(pair.prompt) + list(pair.completion)
        with torch.no_grad():
            loss = model(input_ids=torch.tensor([[*pair.prompt, *pair.completion]]), labels=torch.tensor([labels])).loss
        nats, tokens = nats + float(loss) * len(pair.completion), tokens + len(pair.completion)
    return nats / tokens


def test_figures_do_not_depend_on_the_batch_and_the_seed_repeats_them(folder: Path) -> None:
    one = run(folder, ranks=(1,), metrics=("bleu", "chrf"), batch_size=1)
    other = run(folder, ranks=(1,), metrics=("bleu", "chrf"), batch_size=8)
    for a, b in zip(one.metrics, other.metrics, strict=True):
        assert a.by_rank[1].value == pytest.approx(b.by_rank[1].value, rel=1e-4)
        assert a.by_rank[1].low == pytest.approx(b.by_rank[1].low, rel=1e-4)
    assert other == run(folder, ranks=(1,), metrics=("bleu", "chrf"), batch_size=8)


def test_plain_text_is_measured_token_by_token_and_nothing_is_generated(folder: Path) -> None:
    report = run(folder, "text.jsonl", ranks=(1,))
    assert [metric.name for metric in report.metrics] == ["loss per token", "perplexity"]
    with pytest.raises(AdapterError, match=r"metrics: bleu can't be measured on text.jsonl.*legal: loss, perplexity"):
        run(folder, "text.jsonl", metrics=("bleu",))


READS = 48
"""Tokens that `short_sighted` reads."""
LONG = " cat" * READS


def short_sighted(folder: Path, out: Path) -> str:
    """The model, with a tokenizer that takes READS tokens."""
    shutil.copytree(folder / "model", out)
    file = out / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_max_length": READS}))
    return str(out)


def test_what_is_too_long_is_left_out_and_the_report_says_so(folder: Path, tmp_path: Path) -> None:
    model = short_sighted(folder, tmp_path / "model")
    rows = [{"prompt": p, "completion": c} for p, c in PAIRS]
    more = [{"prompt": "the" + LONG, "completion": " sat"}, {"prompt": "a rat", "completion": LONG}]
    report = run(folder, str(lines(tmp_path / "long.jsonl", [*rows, *more])), model=model, ranks=(1,), metrics=("bleu",))
    assert f"; 2 of the prompts left out, too long for the model's {READS} tokens;" in report.source
    short = run(folder, model=model, ranks=(1,), metrics=("bleu",))
    assert (report.metrics, report.examples) == (short.metrics, len(PAIRS))
    tokenizer = AutoTokenizer.from_pretrained(model)
    several = CompletionSet([Example("on", (LONG, " the mat")), Example(LONG, (" sat",))], tokenizer, max_tokens=READS)
    assert several.lost.startswith("1 of the prompts and 1 more of the completions left out") and len(several) == 1
    with pytest.raises(DataError, match=f"no prompt with its completion fits the model, which reads at most {READS} tokens"):
        run(folder, str(lines(tmp_path / "only.jsonl", more)), model=model, metrics=())


def test_a_classifiers_texts_that_are_cut_are_counted(folder: Path, tmp_path: Path) -> None:
    model = short_sighted(folder, tmp_path / "model")
    rows = [{"text": text, "label": "yes" if label else "no"} for text, label in [*TEXTS, (LONG, False)]]
    data = lines(tmp_path / "long.jsonl", rows)
    report = run(folder, str(data), "classifier", model=model, ranks=(2,), metrics=("accuracy",))
    assert report.examples == len(rows) and report.source.endswith(f"; 1 of the texts cut to {READS} tokens")


def test_a_classifier_is_measured_beside_the_majority_class(folder: Path) -> None:
    report = run(folder, "labels.jsonl", "classifier", metrics=("accuracy", "matthews"))
    loss, accuracy, matthews = report.metrics
    assert report.base_name == "majority" and any("most frequent class" in note for note in report.notes)
    assert accuracy.base is not None and accuracy.base.value == pytest.approx(0.6)
    assert matthews.base is not None and matthews.base.value == 0
    truth, logits = stock_classes(folder)
    assert accuracy.by_rank[2].value == pytest.approx((logits.argmax(1) == truth).float().mean().item())
    expected = torch.nn.functional.cross_entropy(logits, truth).item()
    assert loss.by_rank[2].value == pytest.approx(expected, rel=1e-4)


def stock_classes(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """True classes, "no" being 0, and stock PEFT's logits, a text at a time."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    base = AutoModelForSequenceClassification.from_pretrained(folder / "model", num_labels=2, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, str(folder / "classifier")).eval()
    with torch.no_grad():
        logits = [model(input_ids=torch.tensor([tokenizer(text).input_ids])).logits for text, _ in TEXTS]
    return torch.tensor([int(label) for _, label in TEXTS]), torch.cat(logits)


def test_a_classifier_without_a_trained_head_is_refused(folder: Path) -> None:
    with pytest.raises(InvalidAdapter, match=r"score.weight: neither the base model .* nor the adapter has it trained"):
        run(folder, "labels.jsonl", "lora")


def test_data_of_other_classes_is_refused(folder: Path, tmp_path: Path) -> None:
    data = lines(tmp_path / "three.jsonl", [{"text": "the cat", "label": label} for label in ("yes", "no", "maybe")])
    with pytest.raises(DataError, match=r"3 classes \(maybe, no, yes\); the adapter's head score.weight has 2"):
        evaluate(folder / "classifier", data, model=str(folder / "model"))


def test_roberta_reads_two_tokens_less_than_it_has_positions(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    sizes = {"vocab_size": 96, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = RobertaConfig(**sizes, max_position_embeddings=34, pad_token_id=1)
    assert max_tokens(AutoModelForSequenceClassification.from_config(config), tokenizer) == 32


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"ranks": "1-x"}, "ranks: '1-x' is neither a range of ranks like 1-16 nor a list"),
        ({"ranks": "3,9"}, "rank 9 is not a rank of this adapter"),
        ({"ranks": 4}, "ranks: 4 is not a sequence"),
        ({"ranks": (9,)}, "rank 9 is not a rank of this adapter; legal ranks: 1, 2, 3, 4"),
        ({"model": "./nowhere"}, "model: ./nowhere is not a folder"),
        ({"model": None}, "model: the adapter's config names no base model; give a folder or a hub name"),
        ({"device": "gpu"}, "device: 'gpu' is not a device of torch"),
        ({"dtype": "int8"}, "dtype: 'int8' is not one of auto, float32, bfloat16, float16"),
        ({"write": False}, "write: of the command line only"),
        ({"max_new_tokens": 9000}, "expected max_new_tokens of at most"),
        ({"max_examples": 0}, "max_examples must be at least 1, not 0"),
        ({"metrics": ("accuracy",)}, "metrics: accuracy can't be measured on pairs.jsonl"),
        ({"out": Path("plot.pdf")}, r"out: plot.pdf is neither a folder nor a file of .json, .md, .png, .svg"),
        ({"length_penalty": 0.8}, "length_penalty needs num_beams of at least 2"),
    ],
)
def test_bad_input_is_named(folder: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises((AdapterError, DataError, IllegalRank), match=said):
        run(folder, **options)


def test_the_model_that_the_adapters_config_names_is_taken_or_missed_by_name(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder / "lora", tmp_path / "lora")
    edit_config(copy, base_model_name_or_path=str(folder / "model"))
    report = evaluate(copy, folder / "pairs.jsonl", metrics=(), ranks=(4,), resamples=100, device="cpu")
    assert report.title == "lora, base model model"
    edit_config(copy, base_model_name_or_path="/no/such/model")
    with pytest.raises(AdapterError, match="/no/such/model is not a folder; the adapter's config names it, name another"):
        evaluate(copy, folder / "pairs.jsonl")


def test_examples_are_drawn_by_the_seed(folder: Path) -> None:
    first, again, other = (run(folder, metrics=(), max_examples=3, seed=seed) for seed in (1, 1, 5))
    assert first == again and first.examples == 3 and "3 of them, drawn with seed 1" in first.source
    assert first.metrics[0].by_rank[4].value != other.metrics[0].by_rank[4].value


def test_a_report_is_written_where_and_as_it_is_asked_for(folder: Path, tmp_path: Path) -> None:
    report = run(folder, metrics=("perplexity",), ranks=(1,), out=tmp_path / "new" / "folder")
    assert {path.name for path in (tmp_path / "new" / "folder").iterdir()} == {"quality.json", "quality.png", "quality.svg"}
    assert QualityProfile.load(tmp_path / "new" / "folder" / "quality.json", r_max=4) == report.profile
    assert report.write(tmp_path / "table.md") == (tmp_path / "table.md",)
    assert (tmp_path / "table.md").read_text() == markdown_table(report) + "\n"
    assert "| rank | loss per completion token | perplexity |" in markdown_table(report)
    assert json.loads(json.dumps(report.to_json()))["metrics"][0]["ranks"]["1"]["value"] == report.profile.primary.values[1]


def test_a_small_difference_shows_in_the_paired_interval_though_the_bands_overlap() -> None:
    generator = torch.Generator().manual_seed(0)
    hard = (torch.rand(200, 1, generator=generator) * 10).double().numpy()
    full = torch.cat([torch.from_numpy(hard), torch.ones(200, 1)], dim=1).numpy()
    worse = full + torch.tensor([0.1, 0]).double().numpy()
    report = report_of(Measurement((LOSS,), {1: (worse,), 2: (full,), 4: (full,)}), title="t", source="s", resamples=200)
    (loss,) = report.metrics
    assert loss.by_rank[1].low < loss.by_rank[4].high
    assert [loss.verdict(rank) for rank in (1, 2, 4)] == [Verdict.WORSE, Verdict.SAME, Verdict.SAME]
    assert loss.against_full[1].value == pytest.approx(0.1) and set(loss.against_full) == {1, 2}
    rows = text_table(report).splitlines()
    assert [row.endswith(" -") for row in rows[3:6]] == [True, False, False]


def test_beams_are_transformers_own(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    prompts = [tokenizer(p).input_ids for p, _ in PAIRS[:3]]
    decoding = Decoding(max_new_tokens=6, num_beams=3, length_penalty=0.8, no_repeat_ngram_size=2)
    assert str(decoding) == "beam 3, length penalty 0.8, no repeated 2-gram"
    for prompt, text in zip(prompts, generate(model, tokenizer, prompts, decoding), strict=True):
        arguments = {"num_beams": 3, "length_penalty": 0.8, "no_repeat_ngram_size": 2, "max_new_tokens": 6, "pad_token_id": 0}
        ids = torch.tensor([prompt])
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
            **arguments,
        )
        assert text == tokenizer.decode(out[0, len(prompt) :], skip_special_tokens=True).strip()


def test_texts_do_not_depend_on_what_else_is_in_the_batch() -> None:
    model, tokenizer = load_base(ARTIFACTS)
    AttachedAdapter(model, read_peft(ARTIFACTS / "adapters" / "mr-to-text")).select(4)
    prompts = ["name[Aromi], area[riverside]", "name[The Eagle], eatType[coffee shop], near[Burger King]", "name[Cotto]"]
    encoded = [tokenizer(prompt).input_ids for prompt in prompts]
    alone = [generate(model, tokenizer, [prompt], Decoding(16))[0] for prompt in encoded]
    assert generate(model, tokenizer, encoded, Decoding(16)) == alone
    assert all(alone)


def test_measuring_leaves_the_model_and_takes_any_references(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    attached = AttachedAdapter(model, read_peft(folder / "lora"))
    examples = [Example("the cat", (" sat", " sat on the mat", " there")), Example("on", (" the mat",))]
    data = CompletionSet(examples, tokenizer, [BLEU], decoding=Decoding(4), loss_completions=2)
    found = measure(model, attached.select, data, (1, 4))
    attached.select(None)
    assert found.base is not None and [each.shape for each in found.base] == [(2, 2), (2, 10)]
    completions = [replace(example, completions=example.completions[:2]) for example in examples]
    assert found.base[0][:, 1].sum() == sum(len(pair.completion) for pair in encode(completions, tokenizer))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_options_of_the_command_line_are_those_of_python() -> None:
    parser = argparse.ArgumentParser()
    COMMAND.add_to(parser.add_subparsers())
    words = "evaluate a --data d --ranks 1-3,8 --metrics bleu,chrf --num-beams 10 --length-penalty 0.8 --no-write"
    options = COMMAND.options_of(vars(parser.parse_args(words.split())))
    assert options == EvaluateOptions(
        Path("a"),
        Path("d"),
        ranks=(1, 2, 3, 8),
        metrics=(MetricName.BLEU, MetricName.CHRF),
        num_beams=10,
        length_penalty=0.8,
        write=False,
    )
