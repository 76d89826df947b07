"""Columns of many adapters side by side, and merged weights within a bound."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from adapters.adapter import Adapter, LowRank
from adapters.config import AdapterConfig, AdapterKind
from adapters.errors import InvalidAdapter
from service.core import AdapterChoice
from service.engine.adapted import lora_step
from service.engine.lora import LoraBank
from service.engine.merged import MergedCache, MergedWeights, merge, merged_nbytes
from service.engine.native.kernels import kernels
from service.engine.sites import Site, site_kind

WIDTH, OUT, VOCAB = 6, 16, 11


class Toy(nn.Module):
    """An embedding, a linear layer and a norm."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.lin = nn.Linear(WIDTH, OUT)
        self.norm = nn.LayerNorm(OUT)

    def forward(self, ids: Tensor) -> Tensor:
        return self.norm(self.lin(self.embed(ids)))  # type: ignore[no-any-return]


def adapter(seed: int, *, r_max: int = 3, paths: tuple[str, ...] = ("lin", "embed")) -> Adapter:
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    every = {
        "lin": LowRank(noise(r_max, WIDTH), noise(OUT, r_max)),
        "embed": LowRank(noise(r_max, VOCAB), noise(WIDTH, r_max), is_embedding=True),
    }
    return Adapter(AdapterConfig(AdapterKind.DYLORA, r_max, 2.0), {path: every[path] for path in paths})


def choice(version: str, of: Adapter, rank: int) -> AdapterChoice:
    return AdapterChoice(version, rank, of.config.scale(rank))


def bank_of(toy: Toy, *, columns: int = 256, is_native: bool = False) -> LoraBank:
    return LoraBank(toy, toy.embed, columns=columns, kernels=kernels() if is_native else None)


def special(seed: int) -> Adapter:
    """With all that goes beyond the low-rank product."""
    return replace(
        adapter(seed),
        lora_bias={"lin": torch.full((OUT,), 0.3)},
        base_bias={"norm": torch.full((OUT,), -0.7)},
        saved_modules={"lin.weight": torch.full((OUT, WIDTH), 0.1), "embed.weight": torch.ones(VOCAB, WIDTH)},
    )


@pytest.mark.parametrize("is_native", [True, False])
@torch.inference_mode()
def test_each_row_gets_its_own_adapter_and_rank(is_native: bool) -> None:
    toy = Toy()
    bank = bank_of(toy, columns=4, is_native=is_native)
    adapters = {"a": adapter(1), "b": adapter(2, r_max=4), "c": adapter(3, paths=("lin",)), "d": special(4)}
    for version, each in adapters.items():
        bank.acquire(version, each)
    choices = [None, *(choice(version, each, rank) for version, each in adapters.items() for rank in each.config.ranks)]
    lengths = [1 + i % 3 for i in range(len(choices))]
    ids = torch.randint(VOCAB, (1, sum(lengths)))
    sampled = torch.tensor([0, 3, sum(lengths) - 1])

    with lora_step(bank.step(choices, lengths, sampled)):
        mixed = torch.split(toy(ids)[0], lengths)
    fresh = Toy()
    for asked, rows, got in zip(choices, torch.split(ids[0], lengths), mixed, strict=True):
        weights = None if asked is None else merge(adapters[asked.version], asked, bank.site)
        with lora_step(weights):
            expected = (fresh if asked is None else toy)(rows[None])[0]
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_merging_is_the_formula_and_leaves_the_base_alone() -> None:
    toy = Toy()
    bank, one = bank_of(toy), adapter(1)
    before = {name: value.clone() for name, value in toy.state_dict().items()}
    merged = merge(one, choice("a", one, 2), bank.site).parameters
    factors = one.modules["lin"]
    torch.testing.assert_close(merged["lin"]["weight"], toy.lin.weight + (2.0 / 2) * factors.b[:, :2] @ factors.a[:2])
    table = one.modules["embed"]
    torch.testing.assert_close(merged["embed"]["weight"], toy.embed.weight + ((2.0 / 2) * table.b[:, :2] @ table.a[:2]).T)
    assert all(torch.equal(value, before[name]) for name, value in toy.state_dict().items())


def test_a_bank_grows_for_adapters_in_use_and_reuses_the_room_of_idle_ones() -> None:
    bank = bank_of(Toy(), columns=6)
    for number in range(2):
        bank.acquire(f"busy{number}", adapter(number))
    small = bank.nbytes
    bank.release("busy0")
    bank.acquire("next", adapter(5))
    assert (bank.resident, bank.nbytes) == (2, small)
    bank.acquire("more", adapter(6))
    assert (bank.resident, bank.users) == (3, 3)
    assert bank.nbytes > small


def beyond_any_memory() -> Adapter:
    """Of a rank whose columns no machine can hold; its own numbers are one row, seen again and again."""
    rank = 1 << 45
    factors = LowRank(torch.zeros(1, WIDTH).expand(rank, WIDTH), torch.zeros(OUT, 1).expand(OUT, rank))
    return Adapter(AdapterConfig(AdapterKind.LORA, rank, 1.0), {"lin": factors})


@pytest.mark.parametrize("has_columns", [True, False])
@torch.inference_mode()
def test_an_adapter_for_which_memory_is_lacking_leaves_the_bank_as_it_was(has_columns: bool) -> None:
    toy = Toy()
    bank = bank_of(toy, columns=4)
    one = adapter(1)
    if has_columns:
        bank.acquire("one", one)
    with pytest.raises(RuntimeError):
        bank.acquire("giant", beyond_any_memory())
    assert (bank.resident, bank.users) == (has_columns, has_columns)
    for version in ("one", "two", "three"):  # room for one of them alone, so the bank grows
        bank.acquire(version, one)
    ids = torch.randint(VOCAB, (1, 3))
    choices = [choice(version, one, 3) for version in ("one", "two", "three")]
    with lora_step(bank.step(choices, [1, 1, 1], torch.arange(3))):
        mixed = toy(ids)
    with lora_step(merge(one, choices[0], bank.site)):
        torch.testing.assert_close(mixed, toy(ids), rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_columns_are_given_back_when_few_are_needed_and_nobody_uses_them() -> None:
    toy = Toy()
    bank = bank_of(toy, columns=4)
    adapters = {f"v{number}": adapter(number) for number in range(8)}
    for version, each in adapters.items():
        bank.acquire(version, each)
    large = bank.nbytes
    for version in adapters:
        bank.release(version)
    assert bank.nbytes == large  # all may be asked for again
    bank.acquire("v7", adapters["v7"])
    for version in list(adapters)[:7]:
        bank.forget(version)
    assert (bank.resident, bank.nbytes) == (1, large)  # a step may run with them
    bank.release("v7")
    assert (bank.resident, bank.nbytes) == (0, 0)
    bank.acquire("v7", adapters["v7"])
    assert 0 < bank.nbytes < large / 4
    ids = torch.randint(VOCAB, (1, 2))
    with lora_step(bank.step([choice("v7", adapters["v7"], 3)], [2], torch.arange(2))):
        mixed = toy(ids)
    with lora_step(merge(adapters["v7"], choice("v7", adapters["v7"], 3), bank.site)):
        torch.testing.assert_close(mixed, toy(ids), rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_a_new_owner_never_sees_the_numbers_of_the_former_one() -> None:
    toy = Toy()
    bank = bank_of(toy, columns=3)
    bank.acquire("old", adapter(1))
    bank.release("old")
    quiet = adapter(2, paths=("embed",))
    bank.acquire("new", quiet)
    ids = torch.randint(VOCAB, (1, 4))
    with lora_step(bank.step([choice("new", quiet, 3)], [4], torch.tensor([3]))):
        mixed = toy(ids)
    with lora_step(merge(quiet, choice("new", quiet, 3), bank.site)):
        torch.testing.assert_close(mixed, toy(ids))


@torch.inference_mode()
def test_an_adapter_leaves_alone_what_is_given_other_rows_than_the_steps() -> None:
    class Halved(Toy):
        """Its linear layer, as an expert does, computes some of the rows."""

        def forward(self, ids: Tensor) -> Tensor:
            return self.norm(self.lin(self.embed(ids)[:, ::2]).repeat_interleave(2, 1))  # type: ignore[no-any-return]

    toy, shift = Halved(), Adapter(AdapterConfig(AdapterKind.LORA, 2, 1.0), {}, base_bias={"norm": torch.full((OUT,), -0.7)})
    bank = bank_of(toy, is_native=True)
    ids = torch.randint(VOCAB, (1, 6))
    before = toy(ids)
    bank.acquire("shift", shift)
    with lora_step(bank.step([choice("shift", shift, 2)], [6], torch.tensor([5]))):
        torch.testing.assert_close(toy(ids), before - toy.norm.bias - 0.7)


def test_an_adapter_that_does_not_fit_is_refused_with_every_offender() -> None:
    wrong = Adapter(
        AdapterConfig(AdapterKind.LORA, 2, 1.0),
        {
            "lin": LowRank(torch.zeros(2, WIDTH + 1), torch.zeros(OUT, 2)),
            "nowhere": LowRank(torch.zeros(2, 3), torch.zeros(3, 2)),
            "norm": LowRank(torch.zeros(2, OUT), torch.zeros(OUT, 2)),
            "embed": LowRank(torch.zeros(2, WIDTH), torch.zeros(WIDTH, 2)),
        },
        base_bias={"embed": torch.zeros(3)},
        saved_modules={"embed.weight": torch.zeros(VOCAB + 2, WIDTH), "score.weight": torch.zeros(2, 2)},
    )
    with pytest.raises(InvalidAdapter) as refused:
        bank_of(Toy()).check(wrong)
    assert [problem.split(":")[0] for problem in refused.value.problems] == [
        "lin",
        "nowhere",
        "norm",
        "embed",
        "embed.bias",
        "embed.weight",
        "score.weight",
    ]
    assert "vocabulary" in str(refused.value)


def weights(numbers: int) -> MergedWeights:
    buffer = torch.zeros(4 * numbers, dtype=torch.uint8)
    return MergedWeights({"lin": {"weight": buffer.view(torch.float32)}}, buffer, is_plain=True)


def test_the_cache_keeps_within_its_bytes_and_drops_the_least_recently_used() -> None:
    cache = MergedCache(capacity_bytes=100)
    a, b, c = (AdapterChoice(name, 1, 1.0) for name in "abc")
    for each in (a, b):
        assert cache.make_room(40) is None
        cache.put(each, weights(10))
    assert cache.get(a) is not None
    held = cache.get(b)
    assert held is not None
    assert cache.get(a) is not None
    assert cache.make_room(40) is held.buffer  # to be written over, since making new memory takes as long as merging
    assert cache.stats.nbytes == 40
    cache.put(c, weights(10))
    assert [cache.get(each) is not None for each in (a, b, c)] == [True, False, True]
    stats = cache.stats
    assert (stats.hits, stats.misses, stats.evictions, stats.nbytes) == (5, 3, 1, 80)
    cache.forget("a")
    assert cache.stats.nbytes == 40


def test_memory_that_fits_is_written_over_and_other_memory_is_left_alone() -> None:
    toy = Toy()
    one, other = adapter(1), adapter(2)
    site = bank_of(toy).site
    first, expected = merge(one, choice("a", one, 3), site), merge(other, choice("b", other, 2), site)
    again = merge(other, choice("b", other, 2), site, buffer=first.buffer)
    assert again.buffer is first.buffer
    for path, parameters in expected.parameters.items():
        assert torch.equal(parameters["weight"], again.parameters[path]["weight"])
    small = torch.empty(8, dtype=torch.uint8)
    assert merge(one, choice("a", one, 3), site, buffer=small).buffer is not small


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_merged_in_slices_is_the_weight_merged_whole(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(700, 1000, dtype=dtype)  # more than one slice of 1 MiB in fp32, the last one shorter
    factors = LowRank(torch.randn(4, 700, generator=generator), torch.randn(1000, 4, generator=generator))
    large = Adapter(AdapterConfig(AdapterKind.DYLORA, 4, 2.0), {"lin": factors})
    with torch.inference_mode():
        merged = merge(large, choice("a", large, 3), lambda path: Site(path, linear, site_kind(linear)))
        expected = linear.weight.float() + large.config.scale(3) * factors.b[:, :3] @ factors.a[:3]
    torch.testing.assert_close(merged.parameters["lin"]["weight"], expected.to(dtype))


def test_the_bytes_of_a_merge_are_known_before_it_is_made() -> None:
    toy = Toy()
    one = adapter(1)
    expected = merge(one, choice("a", one, 1), bank_of(toy).site).nbytes
    assert expected <= merged_nbytes(one, lambda path: Site(path, getattr(toy, path), site_kind(getattr(toy, path))))


def test_a_module_that_runs_with_other_parameters_keeps_its_own_for_those_who_read_it_meanwhile() -> None:
    class Watched(nn.Embedding):
        def forward(self, input: Tensor) -> Tensor:
            seen.append(site.weight)
            return super().forward(input)

    seen: list[Tensor] = []
    watched = Watched(VOCAB, WIDTH)
    site = Site("embed", watched, site_kind(watched))
    other, ids = torch.zeros(VOCAB, WIDTH), torch.arange(3)
    assert torch.equal(site.run(ids, {"weight": other}), other[:3])
    assert seen == [watched.weight]
    assert torch.equal(site.run(ids, {}), watched.weight[:3])
