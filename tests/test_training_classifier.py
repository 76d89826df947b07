"""Sequence classification: the head is trained with the adapter, and stock PEFT loads both."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from adapters.checkpoint import read_peft
from adapters.commands.evaluate import evaluate
from adapters.commands.export import export
from adapters.commands.train import train
from adapters.data.example import Task
from adapters.errors import AdapterError, TrainingError
from adapters.nesting import export_rank
from adapters.training.base_model import Precision, load_base
from adapters.training.heads import modules_to_train
from adapters.training.layer import set_rank, target_paths, write_adapter
from adapters.training.token_limit import max_tokens
from tests.tiny_models import POSITIONS, some_tokens
from tests.training_harness import model_folder, word_tokenizer, write_labelled, write_lines, write_pairs

QUICK = {"r_max": 2, "max_steps": 30, "learning_rate": 1e-2, "disable_tqdm": True, "save_steps": 0}
WHOLE = {"bert": ("bert.pooler.dense", "classifier"), "roberta": ("classifier",), "llama": ("score",), "gpt2": ("score",)}


@pytest.mark.parametrize("kind", ["bert", "roberta", "llama", "gpt2"])
def test_an_exported_rank_gives_stock_peft_the_same_logits(tmp_path: Path, kind: str) -> None:
    folder = model_folder(tmp_path / "base", kind)
    report = train(folder, write_labelled(tmp_path / "data.jsonl"), tmp_path / "out", **QUICK)
    adapter = read_peft(tmp_path / "out")
    assert adapter.training["modules_to_save"] == list(WHOLE[kind])
    assert report.metrics["eval_rank_2_accuracy"] > 0.8

    def fresh(seed: int) -> torch.nn.Module:
        """The base with a head of its own chance."""
        torch.manual_seed(seed)
        model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2, pad_token_id=0).eval()
        assert isinstance(model, torch.nn.Module)
        return model

    tokens = some_tokens()
    for rank in (1, 2):
        ours = fresh(1)
        write_adapter(ours, adapter)
        set_rank(ours, rank)
        export_rank(adapter, rank, tmp_path / f"rank{rank}")
        theirs = PeftModel.from_pretrained(fresh(2), str(tmp_path / f"rank{rank}")).eval()
        with torch.no_grad():
            torch.testing.assert_close(theirs(tokens).logits, ours(tokens).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["bert", "roberta", "llama", "gpt2"])
def test_the_head_is_no_target_and_what_the_checkpoint_lacked_is_trained(tmp_path: Path, kind: str) -> None:
    folder, device = model_folder(tmp_path, kind), torch.device("cpu")
    base = load_base(str(folder), Task.CLASSIFICATION, ("no", "yes"), precision=Precision(), device=device)
    whole = modules_to_train(base.model, base.missing)
    assert tuple(sorted(whole)) == WHOLE[kind]
    targets = target_paths(base.model, "all-linear", whole)
    assert not [path for path in targets if path.startswith(whole)]
    assert base.model.config.id2label == {0: "no", 1: "yes"}
    assert max_tokens(base.model, base.tokenizer) == (POSITIONS - 1 if kind == "roberta" else POSITIONS)


def test_an_adapter_knows_its_classes_by_name(tmp_path: Path) -> None:
    base, data = model_folder(tmp_path / "base", "bert"), tmp_path / "data.jsonl"
    texts = {"small": "w1 w2", "large": "w5 w6", "odd": "w9 w10"}
    lines = [{"text": text, "label": label} for label, text in texts.items()] * 12
    write_lines(data, lines)
    train(base, data, tmp_path / "out", **QUICK)
    assert read_peft(tmp_path / "out").config.labels == ("large", "odd", "small")

    # In this file's own count odd would be 0 and small 1.
    some = write_lines(tmp_path / "some.jsonl", [line for line in lines if line["label"] != "large"])
    found = evaluate(tmp_path / "out", some, metrics=("accuracy",), model=base)
    assert found.profile.primary.values[2] < 0.3  # nats per text; with the classes mixed up it is above 1
    export(tmp_path / "out", tmp_path / "merged", merge=True, model=base)
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert merged.config.id2label == {0: "large", 1: "odd", 2: "small"}


def test_evaluation_data_with_other_classes_is_refused_and_with_fewer_is_not(tmp_path: Path) -> None:
    folder, data = model_folder(tmp_path / "base", "bert"), write_labelled(tmp_path / "data.jsonl")
    lines = data.read_text().splitlines()
    (tmp_path / "dev.jsonl").write_text(lines[1] + "\n" + lines[3] + "\n" + lines[0].replace("lower", "middle") + "\n")
    with pytest.raises(AdapterError, match="middle"):
        train(folder, data, tmp_path / "a", eval_data=tmp_path / "dev.jsonl", **QUICK)


def test_muon_is_refused_where_vectors_are_trained(tmp_path: Path) -> None:
    folder, data = model_folder(tmp_path / "base", "bert"), write_labelled(tmp_path / "data.jsonl")
    with pytest.raises(TrainingError, match=r"'muon' moves matrices only, not .*classifier.bias"):
        train(folder, data, tmp_path / "out", optim="muon", **QUICK)


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_causal_data_needs_a_causal_model(tmp_path: Path, kind: str) -> None:
    folder, data = model_folder(tmp_path / "base", kind), write_pairs(tmp_path / "data.jsonl")
    with pytest.raises(TrainingError, match=f"can't be loaded for causal-lm: {kind} reads both ways"):
        train(folder, data, tmp_path / "out", **QUICK)


def test_a_model_that_is_loaded_is_trained_where_it_fits_the_data(tmp_path: Path) -> None:
    folder, data = model_folder(tmp_path / "base", "bert"), write_labelled(tmp_path / "data.jsonl")
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    report = train(model, data, tmp_path / "out", tokenizer=word_tokenizer(), optim="row-adamw", **QUICK)
    assert report.metrics["eval_rank_2_accuracy"] > 0.8
    with pytest.raises(TrainingError, match="needs its tokenizer"):
        train(model, data, tmp_path / "other", **QUICK)
    with pytest.raises(TrainingError, match="not made for causal-lm"):
        train(model, write_pairs(tmp_path / "pairs.jsonl"), tmp_path / "other", tokenizer=word_tokenizer(), **QUICK)


def test_a_decoder_without_a_padding_token_reads_the_same_token_wherever_it_is_loaded(tmp_path: Path) -> None:
    """Each text ends with token 0, which is a word like any other, and only what stands before it tells the classes apart."""
    base, tokenizer = model_folder(tmp_path / "base", "gpt2"), word_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(base)
    lines = [{"text": "w2 <pad>", "label": "no"}, {"text": "w3 w4 w15 <pad>", "label": "yes"}] * 16
    data = write_lines(tmp_path / "data.jsonl", lines)
    loaded = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
    reports = train(base, data, tmp_path / "a", **QUICK), train(loaded, data, tmp_path / "b", tokenizer=tokenizer, **QUICK)
    for report in reports:
        found = evaluate(report.out, data, model=base, metrics=("accuracy",))
        assert found.profile.primary.values[2] == pytest.approx(report.metrics["eval_rank_2_loss"], rel=1e-4)

    export(tmp_path / "a", tmp_path / "merged", rank=2, merge=True, model=base)
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    texts = [line["text"] for line in lines]
    padded = AutoTokenizer.from_pretrained(tmp_path / "merged")(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        classes = merged(**padded).logits.argmax(1).tolist()
    assert [merged.config.id2label[found] for found in classes] == [line["label"] for line in lines]


def test_a_classifier_for_which_no_padding_can_be_found_is_refused(tmp_path: Path) -> None:
    base, tokenizer = model_folder(tmp_path / "base", "gpt2"), word_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token = None
    tokenizer.save_pretrained(base)
    with pytest.raises(AdapterError, match="neither its config nor its tokenizer names a padding token"):
        train(base, write_labelled(tmp_path / "data.jsonl"), tmp_path / "out", **QUICK)
    assert not (tmp_path / "out").exists()
