"""Corpora of a few lines in the layout that the recipe reads, and bases that are trained on them in two steps."""

import csv
import json
from pathlib import Path
from string import ascii_lowercase

from transformers import BertConfig, BertModel, BertTokenizer

from adapters.paper.bases import RECIPES, BaseName, make_base
from adapters.paper.causal_base import CausalRecipe
from adapters.paper.encoder_base import EncoderRecipe
from adapters.paper.pretrained import BaseRecipe
from adapters.training.pretraining import PretrainSettings

SETTINGS = PretrainSettings(steps=2, report_steps=1)
NAMES = ("Aromi", "Bibimbap House", "Cotto", "The Eagle", "Fitzbillies", "Zizzi")
FOODS = ("Chinese", "English", "French", "Indian")


def write_corpora(folder: Path) -> Path:
    """Every file that the recipe reads, six to twenty-four rows each."""
    facts = [(name, food) for name in NAMES for food in FOODS]
    for split in ("train", "dev"):
        _e2e(folder / "e2e" / f"{split}set.csv", facts)
        _json(folder / "webnlg2017" / f"{split}.json", {"entries": [{str(i): _entry(*f)} for i, f in enumerate(facts)]})
        sentences = [f"{name} serves {food} food" for name, food in facts]
        _tsv(folder / "glue/SST-2" / f"{split}.tsv", ["sentence", "label"], [[s, str(i % 2)] for i, s in enumerate(sentences)])
        _tsv(folder / "glue/CoLA" / f"{split}.tsv", None, [["x", str(i % 2), "", s] for i, s in enumerate(sentences)])
        _tsv(
            folder / "glue/MRPC" / f"{split}.tsv",
            ["Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"],
            [[str(i % 2), "1", "2", s, s] for i, s in enumerate(sentences)],
        )
        _tsv(
            folder / "glue/RTE" / f"{split}.tsv",
            ["index", "sentence1", "sentence2", "label"],
            [[str(i), s, s, ("entailment", "not_entailment")[i % 2]] for i, s in enumerate(sentences)],
        )
    dart = [{"tripleset": [[name, "FOOD", food]], "annotations": [{"text": f"{name}: {food}."}]} for name, food in facts]
    _json(folder / "dart" / "dart-v1.1.1-full-dev.json", dart)
    return folder


def write_bases(data: Path, out: Path) -> None:
    """Both bases, tiny, under `out`/bases."""
    recipes: dict[BaseName, BaseRecipe] = {
        BaseName.CAUSAL: CausalRecipe(
            SETTINGS,
            RECIPES[BaseName.CAUSAL].shares,
            row_tokens=32,
            batch_tokens=128,
            hidden_size=16,
            intermediate_size=32,
            layers=2,
            heads=2,
            max_tokens=512,
            vocab_size=300,
        ),
        BaseName.ENCODER: EncoderRecipe(
            SETTINGS,
            RECIPES[BaseName.ENCODER].shares,
            row_tokens=32,
            batch_tokens=128,
            start=_bert(out / "start"),
        ),
    }
    for name, recipe in recipes.items():
        make_base(name, data, out / "bases" / name, recipe)


def _bert(folder: Path) -> Path:
    """A BERT without a head, that reads letters."""
    vocabulary = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *ascii_lowercase,
        *(f"##{letter}" for letter in ascii_lowercase),
    ]
    BertTokenizer({token: number for number, token in enumerate(vocabulary)}).save_pretrained(folder)
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=len(vocabulary), **shape)).save_pretrained(folder)
    return folder


def _entry(name: str, food: str) -> dict[str, object]:
    triples = [{"subject": name, "property": "food", "object": food}]
    texts = [{"lex": f"{name} serves {food} food.", "comment": "good"}]
    return {"modifiedtripleset": triples, "lexicalisations": texts}


def _e2e(path: Path, facts: list[tuple[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["mr", "ref"])
        rows.writerows([f"name[{name}], food[{food}]", f"{name} serves {food} food."] for name, food in facts)


def _tsv(path: Path, header: list[str] | None, rows: list[list[str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join("\t".join(row) + "\n" for row in [*([header] if header else []), *rows]))


def _json(path: Path, document: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document))
