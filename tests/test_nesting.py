"""Re-nesting, cutting to a rank, exporting: the function is kept, and what is left is the best that is left."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from adapters.adapter import Adapter, LowRank
from adapters.checkpoint import CONFIG_FILE, QUALITY_FILE, TENSORS_FILE, read_peft, write_peft
from adapters.config import AdapterConfig, AdapterKind
from adapters.errors import IllegalRank, InvalidAdapter
from adapters.nesting import at_rank, energy_per_rank, export_rank, renest
from adapters.quality import Metric, QualityProfile
from tests.checkpoints import delta, edit_config, random_adapter
from tests.tiny_models import random_peft_adapter, some_tokens, stock_logits, tiny_model

GENUINE = Path(__file__).parents[1] / ".." / "shared" / "models" / "lora_roberta_base_mnli"


def best_of_rank(dense: torch.Tensor, rank: int) -> torch.Tensor:
    """The closest matrix of a rank in the Frobenius norm, from the dense SVD."""
    u, s, vh = torch.linalg.svd(dense, full_matrices=False)
    best: torch.Tensor = (u[:, :rank] * s[:rank]) @ vh[:rank]
    return best


@settings(max_examples=40, deadline=None)
@given(r=st.integers(1, 8), in_features=st.integers(1, 20), out_features=st.integers(1, 20), seed=st.integers(0, 2**31))
def test_every_truncation_of_a_renested_lora_is_optimal(r: int, in_features: int, out_features: int, seed: int) -> None:
    plain = random_adapter(AdapterKind.LORA, r=r, seed=seed, in_features=in_features, out_features=out_features)
    nested = renest(plain)
    assert nested.config.kind is AdapterKind.RENESTED
    assert nested.config.r_max == min(r, in_features, out_features)
    for path, module in plain.modules.items():
        dense = delta(module)
        size = dense.norm()
        for rank in nested.config.ranks:
            error = (delta(nested.modules[path], rank) - dense).norm()
            least = (best_of_rank(dense, rank) - dense).norm()
            assert error <= least + 1e-6 * size


def test_singular_values_are_shared_between_the_factors() -> None:
    for module in renest(random_adapter(AdapterKind.LORA)).modules.values():
        values = torch.linalg.svdvals(delta(module))[: module.rank]
        torch.testing.assert_close((module.b.double() ** 2).sum(dim=0), values, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close((module.a.double() ** 2).sum(dim=1), values, rtol=1e-5, atol=1e-5)


def test_renesting_keeps_uneven_and_dependent_columns() -> None:
    plain = random_adapter(AdapterKind.LORA, ranks={"m.q": 4, "m.v": 2})
    zero = LowRank(a=torch.randn(3, 12), b=torch.zeros(10, 3), is_embedding=True)
    nested = renest(replace(plain, modules={**plain.modules, "m.zero": zero}))
    assert {path: module.rank for path, module in nested.modules.items()} == {"m.q": 4, "m.v": 2, "m.zero": 3}
    assert nested.modules["m.zero"].is_embedding
    assert torch.equal(delta(nested.modules["m.zero"]), torch.zeros(10, 12, dtype=torch.float64))


def test_renesting_twice_and_the_same_factors_in_another_order_change_nothing() -> None:
    plain = random_adapter(AdapterKind.LORA)
    nested = renest(plain)
    assert renest(nested) is nested
    turned = {path: LowRank(a=-m.a.flip(0), b=-m.b.flip(1)) for path, m in plain.modules.items()}
    for path, module in renest(replace(plain, modules=turned)).modules.items():
        torch.testing.assert_close(module.a, nested.modules[path].a)
        torch.testing.assert_close(module.b, nested.modules[path].b)


def test_a_dylora_is_not_renested() -> None:
    with pytest.raises(ValueError, match="nested as trained"):
        renest(random_adapter(AdapterKind.DYLORA))


def test_factors_beyond_float32_are_named() -> None:
    big = LowRank(a=torch.full((2, 100), 3e38), b=torch.full((100, 2), 3e38))
    with pytest.raises(InvalidAdapter, match=r"m\.big: the update is too large for float32"):
        renest(Adapter(AdapterConfig(AdapterKind.LORA, 2, 1.0), {"m.big": big}))


def test_a_quality_profile_outlives_renesting_and_not_a_cut() -> None:
    quality = QualityProfile((Metric("f1", True, {1: 0.1, 4: 0.9}), Metric("acc", True, {2: 0.5})), "dev")
    nested = renest(replace(random_adapter(AdapterKind.LORA), quality=quality))
    assert nested.quality == quality
    assert at_rank(nested, 2).quality is None


@pytest.mark.parametrize("rslora", [False, True])
def test_a_dylora_at_a_rank_is_its_truncation_under_that_ranks_scale(rslora: bool) -> None:
    adapter = random_adapter(AdapterKind.DYLORA, alpha=6.0, rslora=rslora)
    for rank in range(1, 5):
        cut = at_rank(adapter, rank)
        assert cut.config.kind is AdapterKind.LORA
        assert cut.config.ranks == (rank,)
        scale = 6 / (math.sqrt(rank) if rslora else rank)
        for path, module in adapter.modules.items():
            torch.testing.assert_close(delta(cut.modules[path]), scale * delta(module, rank), rtol=1e-6, atol=1e-6)


def test_a_renested_lora_at_a_rank_keeps_what_does_not_depend_on_the_rank() -> None:
    adapter = replace(
        renest(random_adapter(AdapterKind.LORA, ranks={"m.q": 4, "m.v": 2})),
        lora_bias={"m.q": torch.ones(10)},
        saved_modules={"head.weight": torch.ones(2, 2)},
    )
    cut = at_rank(adapter, 3)
    assert {path: module.rank for path, module in cut.modules.items()} == {"m.q": 3, "m.v": 2}
    assert cut.lora_bias == adapter.lora_bias
    assert cut.saved_modules == adapter.saved_modules
    assert torch.equal(cut.modules["m.q"].b, adapter.modules["m.q"].b[:, :3])


@pytest.mark.parametrize("kind", list(AdapterKind))
def test_a_rank_that_is_not_there_is_refused(kind: AdapterKind, tmp_path: Path) -> None:
    adapter = random_adapter(kind)
    for rank in (0, -1, 5):
        with pytest.raises(IllegalRank):
            at_rank(adapter, rank)
        with pytest.raises(IllegalRank):
            export_rank(adapter, rank, tmp_path)


@pytest.mark.parametrize("rslora", [False, True])
def test_an_exported_dylora_has_its_rank_and_the_alpha_that_gives_its_scale(rslora: bool, tmp_path: Path) -> None:
    adapter = random_adapter(AdapterKind.DYLORA, alpha=6.0, rslora=rslora)
    for rank in (1, 3, 4):
        folder = tmp_path / str(rank)
        export_rank(adapter, rank, folder)
        config = json.loads((folder / CONFIG_FILE).read_text())
        assert config["r"] == rank
        assert config["lora_alpha"] == pytest.approx(adapter.config.scale(rank) * rank)
        assert "dylora" not in config
        assert not (folder / QUALITY_FILE).exists()
        written = load_file(folder / TENSORS_FILE)
        for path, module in adapter.modules.items():
            assert torch.equal(written[f"base_model.model.{path}.lora_B.weight"], module.b[:, :rank])
        read, expected = read_peft(folder), at_rank(adapter, rank)
        for path, module in expected.modules.items():
            torch.testing.assert_close(delta(read.modules[path]), delta(module), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt"])
def test_stock_peft_computes_an_export_as_the_truncated_original(kind: str, tmp_path: Path) -> None:
    tokens = some_tokens()
    random_peft_adapter(kind, tmp_path / "full", r=4, lora_alpha=6)
    edit_config(tmp_path / "full", dylora={"kind": "dylora"})
    adapter = read_peft(tmp_path / "full")
    for rank in (1, 3):
        export_rank(adapter, rank, tmp_path / str(rank))
        model = tiny_model(kind)
        for path, module in adapter.modules.items():
            merged = model.get_submodule(path)
            weight = merged.get_parameter("weight")
            update = (delta(module, rank) * (6 / rank)).float()
            weight.data += update.T if kind == "gpt2" else update
        expected = model(tokens).logits
        torch.testing.assert_close(stock_logits(kind, tmp_path / str(rank), tokens), expected, atol=1e-3, rtol=1e-3)


def test_an_exported_lora_reads_back_as_it_was(tmp_path: Path) -> None:
    adapter = random_adapter(AdapterKind.LORA, ranks={"m.q": 4, "m.v": 2})
    export_rank(adapter, 4, tmp_path)
    read = read_peft(tmp_path)
    assert all(torch.equal(read.modules[path].b, module.b) for path, module in adapter.modules.items())


def test_energy_is_one_at_full_rank_and_the_squared_singular_values_before(tmp_path: Path) -> None:
    nested = renest(random_adapter(AdapterKind.LORA, ranks={"m.q": 4, "m.v": 2}))
    energy = energy_per_rank(nested)
    for path, module in nested.modules.items():
        squares = torch.linalg.svdvals(delta(module))[: module.rank] ** 2
        expected = (squares.cumsum(0) / squares.sum()).tolist()
        assert energy.by_module[path][: module.rank] == pytest.approx(expected, abs=1e-6)
    assert energy.by_module["m.v"][1:] == pytest.approx([1.0, 1.0, 1.0])
    assert energy.mean[0] == pytest.approx((energy.by_module["m.q"][0] + energy.by_module["m.v"][0]) / 2)


def test_energy_of_any_columns_is_what_is_left_of_the_error() -> None:
    adapter = random_adapter(AdapterKind.DYLORA)
    for path, shares in energy_per_rank(adapter).by_module.items():
        dense = delta(adapter.modules[path])
        for rank, share in enumerate(shares, start=1):
            error = (dense - delta(adapter.modules[path], rank)).norm() / dense.norm()
            assert share == pytest.approx(1 - error.item() ** 2, abs=1e-9)


def test_an_update_of_nothing_loses_nothing() -> None:
    nothing = LowRank(a=torch.randn(2, 3), b=torch.zeros(3, 2))
    assert energy_per_rank(Adapter(AdapterConfig(AdapterKind.LORA, 2, 1.0), {"m": nothing})).mean == (1.0, 1.0)


@pytest.mark.skipif(not GENUINE.exists(), reason="the shared models are not here")
def test_a_genuine_trained_lora_keeps_the_energy_that_was_measured(tmp_path: Path) -> None:
    """The table of design/method.md, "Ordinary LoRA is not nested"."""
    adapter = read_peft(GENUINE)
    assert len(adapter.modules) == 24
    assert set(adapter.saved_modules) == {f"classifier.{m}.{p}" for m in ("dense", "out_proj") for p in ("weight", "bias")}
    nested = renest(adapter)
    for found, expected in ((adapter, (0.16, 0.32, 0.58, 1.0)), (nested, (0.49, 0.68, 0.89, 1.0))):
        mean = energy_per_rank(found).mean
        assert [round(mean[rank - 1], 2) for rank in (1, 2, 4, 8)] == list(expected)
    for path, module in adapter.modules.items():
        dense = delta(module)
        assert (delta(nested.modules[path]) - dense).norm() <= 1e-6 * dense.norm()
    write_peft(nested, tmp_path)
    assert read_peft(tmp_path).config == nested.config
