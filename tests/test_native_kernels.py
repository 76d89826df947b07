"""The kernels against torch's own operations, and a row's numbers against those it has alone."""

import ctypes
from pathlib import Path

import pytest
import torch

from service.engine.native import build, prebuilt
from service.engine.native.kernels import BLOCK_ROWS, PANEL, Kernels, LoraRows, Term, kernels, pack, unpack
from service.engine.native.prebuilt import LEVELS, build_all, prebuilt_library
from tests.native_widths import WIDTHS, kernels_of

found = kernels()
pytestmark = pytest.mark.skipif(found is None, reason="there is no C compiler")


@pytest.fixture(params=WIDTHS)
def native(request: pytest.FixtureRequest) -> Kernels:
    return kernels_of(request.param)


def test_kernels_built_ahead_are_the_best_that_the_processor_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert prebuilt_library(tmp_path) is None
    build_all(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {f"{level}.so" for level in LEVELS}
    levels = [*LEVELS.items()]
    for place, (level, needed) in enumerate(levels):
        monkeypatch.setattr(prebuilt, "instructions", lambda needed=needed: b"flags : sse2 " + b" ".join(needed))
        assert prebuilt_library(tmp_path) == tmp_path / f"{level}.so"
        for name in sorted(needed):
            monkeypatch.setattr(prebuilt, "instructions", lambda left=needed - {name}: b" ".join(left))
            below = [tmp_path / f"{each}.so" for each, less in levels[place + 1 :] if less <= needed - {name}]
            assert prebuilt_library(tmp_path) == next(iter(below), None)
    monkeypatch.undo()
    usable = prebuilt_library(tmp_path)
    if usable is None:
        pytest.skip("this processor has no AVX2")
    x, weight = noise(3, 24), noise(32, 24, seed=1)
    torch.testing.assert_close(Kernels(ctypes.CDLL(str(usable))).linear(x, pack(weight), None), x @ weight.T)


def test_a_library_that_can_not_be_loaded_gives_way_to_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cache, temporary = tmp_path / "cache", tmp_path / "temporary"
    monkeypatch.setattr(build, "_folders", lambda: (cache, temporary))
    built = next(build.built_libraries())
    built.write_bytes(b"no library")
    assert kernels.__wrapped__() is not None
    assert (built.parent, (temporary / built.name).exists()) == (cache, True)
    assert caplog.text.count("kernels can't be loaded") == 1
    monkeypatch.setattr(build, "_folders", lambda: (cache,))
    assert (kernels.__wrapped__() is None) == (prebuilt_library() is None)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("rows", [1, 2, 5, 6, 7, 12, 13, 40])
@pytest.mark.parametrize(("out_features", "in_features"), [(16, 8), (48, 300), (32, 5)])
@pytest.mark.parametrize("has_bias", [True, False])
def test_linear_is_torchs_and_a_row_is_the_same_alone(
    native: Kernels, rows: int, out_features: int, in_features: int, has_bias: bool
) -> None:
    x, weight = noise(rows, in_features), noise(out_features, in_features, seed=1)
    bias = noise(out_features, seed=2) if has_bias else None
    assert torch.equal(unpack(pack(weight)), weight)
    got = native.linear(x, pack(weight), bias)
    torch.testing.assert_close(got, torch.nn.functional.linear(x, weight, bias), rtol=1e-5, atol=1e-4)
    for row in range(rows):
        assert torch.equal(native.linear(x[row : row + 1], pack(weight), bias)[0], got[row])


@pytest.mark.parametrize("rows", [6, 21, 65])  # what adapters add comes after a chunk, after each tile, after a chunk
@pytest.mark.parametrize("out_features", [16, 48, 512])
def test_each_row_gets_its_own_adapter_rank_and_scale(native: Kernels, out_features: int, rows: int) -> None:
    in_features, columns = 37, 12
    x, a, b = noise(rows, in_features), noise(columns, in_features, seed=1), noise(columns, out_features, seed=2)
    weight, bias = noise(out_features, in_features, seed=3), noise(out_features, seed=4)
    # One adapter in columns 0 to 6 with rows 4, 0, 2 at ranks 7, 3, 1; another in columns 7 to 11 with row 5 at rank 4.
    blocks = LoraRows(
        counts=torch.tensor([3, 1]),
        starts=torch.tensor([0, 7]),
        widths=torch.tensor([7, 5]),
        ranks=torch.tensor([7, 4]),
        rows=torch.tensor([[4, 0, 2, 0], [5, 0, 0, 0]]),
        row_ranks=torch.tensor([[7, 3, 1, 0], [4, 0, 0, 0]]),
        scales=torch.tensor([[0.5, 2.0, 1.0, 0.0], [3.0, 0.0, 0.0, 0.0]]),
    )
    assert blocks.rows.shape[1] == BLOCK_ROWS
    expected = torch.nn.functional.linear(x, weight, bias)
    for row, start, rank, scale in [(4, 0, 7, 0.5), (0, 0, 3, 2.0), (2, 0, 1, 1.0), (5, 7, 4, 3.0)]:
        own = slice(start, start + rank)
        expected[row] += scale * (x[row] @ a[own].T) @ b[own]
    panels = torch.cat([each.view(len(each), -1, PANEL).transpose(0, 1).flatten() for each in torch.split(b, [7, 5])]).view(
        b.shape
    )
    separate = native.linear(x, pack(weight), bias)
    native.add_lora(x, separate, a, panels, blocks)
    plain, mixed = native.products([Term(pack(weight), bias), Term(pack(weight), bias, a, panels)])(x, blocks)
    torch.testing.assert_close(mixed, expected, rtol=1e-5, atol=1e-4)
    assert torch.equal(mixed, separate)
    assert torch.equal(plain, native.linear(x, pack(weight), bias))


def test_merging_keeps_the_panels(native: Kernels) -> None:
    weight, a, b = noise(48, 20), noise(3, 20, seed=1), noise(48, 5, seed=2)
    merged = torch.empty(48, 20)
    for panels in (range(0, 2), range(2, 3)):
        native.merge(pack(weight), a, b[:, :3], 0.5, merged, panels)
    torch.testing.assert_close(unpack(merged), weight + 0.5 * b[:, :3] @ a)


def test_the_most_probable_token_is_the_first_of_equals(native: Kernels) -> None:
    logits = noise(5, 103)
    logits[1, [7, 90]] = 9.0
    logits[2] = -torch.inf
    logits[2, 50] = 1.0
    logits[3, 4] = torch.nan
    ids, normalisers = native.argmax(logits)
    whole = [0, 1, 2, 4]
    assert ids[whole].tolist() == logits[whole].argmax(-1).tolist()
    torch.testing.assert_close(normalisers[whole], logits[whole].logsumexp(-1), rtol=1e-5, atol=1e-5)
    assert 0 <= ids[3] < 103
    assert normalisers[3].isnan()
