"""The shipped artifacts: whole, small, and of the forms that their readers expect."""

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from adapters.checkpoint import read_peft
from adapters.config import AdapterKind
from adapters.demo import ARTIFACTS, BASE_NAME
from adapters.nesting import renest
from adapters.training.layer import target_paths, write_adapter

FOLDERS = sorted(path for path in (ARTIFACTS / "adapters").iterdir())
PROMPT = "name[Blue Spice], eatType[coffee shop], area[city centre]"


def test_all_artifacts_together_stay_small_and_free_of_pickles() -> None:
    files = [path for path in ARTIFACTS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 30 * 2**20
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".md"}


def test_the_tokenizer_gives_texts_back_and_adds_nothing() -> None:
    tokenizer = AutoTokenizer.from_pretrained(ARTIFACTS / "base")
    for text in (PROMPT, " Café £20, 日本\n"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.eos_token_id is not None
    # prompt and completion are tokenised apart: as one text they must come out the same
    assert tokenizer(PROMPT).input_ids + tokenizer(" Blue Spice is").input_ids == tokenizer(PROMPT + " Blue Spice is").input_ids


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_every_adapter_fits_the_base_and_has_its_quality_at_every_rank(folder: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(ARTIFACTS / "base", dtype="float32")
    adapter = read_peft(folder)
    assert adapter.config.base_model == BASE_NAME
    assert adapter.config.kind is (AdapterKind.LORA if folder.name.endswith("-lora") else AdapterKind.DYLORA)
    assert set(adapter.modules) == set(target_paths(base, "all-linear"))
    assert adapter.quality is not None
    assert all(set(metric.values) == set(range(1, 17)) for metric in adapter.quality.metrics)
    write_adapter(base, adapter if adapter.config.kind is AdapterKind.DYLORA else renest(adapter))
