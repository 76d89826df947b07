"""The scheduler under any order of arrivals, steps and aborts: blocks are never lost, and every request ends."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from service.core import AdapterChoice, GenerationRequest, SamplingParams
from service.engine.blocks import BlockPool
from service.engine.scheduler import Batch, Chunk, Scheduler, Sequence

CHOICES = (None, AdapterChoice("a", 1, 1.0), AdapterChoice("a", 2, 1.0), AdapterChoice("b", 1, 1.0))


def sequence(
    prompt: int | tuple[int, ...],
    new: int,
    choice: AdapterChoice | None = None,
    group: str | None = None,
    tenant: str | None = None,
) -> Sequence:
    tokens = tuple(range(prompt)) if isinstance(prompt, int) else prompt
    return Sequence(GenerationRequest("r", tokens, SamplingParams(max_new_tokens=new), choice, group, tenant))


class SchedulerMachine(RuleBasedStateMachine):
    """Plays the engine: runs scheduled batches, appends a token to what sampled, ends what is complete.

    Keys and values are played by what they depend on: the adapter, the rank, and all tokens up to their own.
    """

    @initialize(
        blocks=st.integers(3, 10),
        block_tokens=st.integers(1, 5),
        max_running=st.integers(1, 6),
        extra=st.integers(0, 12),
        chunk=st.integers(1, 12),
        prefix_cache=st.booleans(),
    )
    def make(self, blocks: int, block_tokens: int, max_running: int, extra: int, chunk: int, prefix_cache: bool) -> None:
        self.pool = BlockPool(blocks, block_tokens)
        self.max_running = max_running
        self.budget = max_running + extra
        self.chunk = chunk
        self.scheduler = Scheduler(
            self.pool,
            max_running=max_running,
            max_batch_tokens=self.budget,
            prefill_chunk_tokens=chunk,
            prefix_cache=prefix_cache,
        )
        self.live: list[Sequence] = []
        self.slots: dict[tuple[int, int], int] = {}  # (block, place in it) to what the keys and values depend on
        self.ranks: dict[tuple[Sequence, int], list[AdapterChoice | None]] = {}  # of each token computed since a preemption

    # Few tokens, so that many prompts begin alike.
    @rule(
        prompt=st.lists(st.integers(0, 1), min_size=1, max_size=20),
        new=st.integers(1, 8),
        choice=st.sampled_from(CHOICES),
        group=st.sampled_from([None, "g", "h"]),
    )
    def arrive(self, prompt: list[int], new: int, choice: AdapterChoice | None, group: str | None) -> None:
        if len(prompt) + new <= self.pool.capacity_tokens:  # the engine refuses what can never fit
            self.live.append(sequence(tuple(prompt), new, choice, group))
            self.scheduler.add(self.live[-1])

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        gone = data.draw(st.sampled_from(self.live))
        self.live.remove(gone)
        self.scheduler.finish(gone)

    @precondition(lambda self: any(each.version == "a" for each in self.live))
    @rule(data=st.data(), rank=st.sampled_from([1, 2]))
    def change_rank(self, data: st.DataObject, rank: int) -> None:
        changed = data.draw(st.sampled_from([each for each in self.live if each.version == "a"]))
        changed.change_rank(AdapterChoice("a", rank, 1.0))

    @rule(version=st.sampled_from("ab"))
    def unload(self, version: str) -> None:
        self.pool.forget(version)

    @rule()
    def step(self) -> None:
        generating = {each for each in self.live if each.blocks and each.pending == 1}
        batch = self.scheduler.schedule()
        if batch is None:
            assert not self.live, "requests are there but nothing runs"
            return
        lengths = [chunk.length for chunk in batch.chunks]
        assert sum(lengths) <= self.budget
        if not generating.isdisjoint(chunk.sequence for chunk in batch.chunks):
            entering = min(len(self.live), self.max_running) - len(generating & {chunk.sequence for chunk in batch.chunks})
            prompt_tokens = sum(chunk.length for chunk in batch.chunks if chunk.sequence not in generating)
            assert prompt_tokens <= self.chunk * sum(range(entering + 1)) + len(generating)
        assert len({id(chunk.sequence) for chunk in batch.chunks}) == len(batch.chunks) <= self.max_running
        for chunk in batch.chunks:
            self.run(chunk)
        sampling = [chunk.sequence for chunk in batch.chunks if chunk.samples]
        self.scheduler.commit(batch)
        for each in sampling:
            each.tokens.append(each.generated % 2)
            if each.generated == each.request.sampling.max_new_tokens:
                self.live.remove(each)
                self.scheduler.finish(each)

    def run(self, chunk: Chunk) -> None:
        sequence = chunk.sequence
        assert chunk.start == sequence.computed
        assert chunk.end <= len(sequence.blocks) * self.pool.block_tokens
        # What it found in the cache must be as if it had been computed at the rank that it begins with.
        ranks = self.ranks.setdefault((sequence, sequence.preemptions), [sequence.choice] * chunk.start)
        ranks += [sequence.choice] * chunk.length
        content = 0
        for at in range(chunk.end):
            number, place = divmod(at, self.pool.block_tokens)
            content = hash((content, sequence.tokens[at], ranks[at]))
            if at < chunk.start:
                assert self.slots[sequence.blocks[number], place] == content, "it would read another's keys and values"
            else:
                holders = [each for each in self.live if sequence.blocks[number] in each.blocks]
                assert holders == [sequence], "it would write to what others read"
                self.slots[sequence.blocks[number], place] = content

    @invariant()
    def nothing_is_lost(self) -> None:
        if hasattr(self, "scheduler"):
            self.scheduler.check_integrity()
            assert self.scheduler.running + self.scheduler.waiting == len(self.live)
            assert {*self.scheduler.sequences()} == {*self.live}

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        # Whatever the state, all that is left ends, and in no more steps than running it one after the other would take.
        bound = sum(len(each.tokens) + each.request.sampling.max_new_tokens for each in self.live) + 1
        for _ in range(bound):
            self.step()
        assert not self.live
        assert self.pool.available == self.pool.total


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(max_examples=50)


def test_requests_are_admitted_in_order_of_arrival() -> None:
    scheduler = Scheduler(BlockPool(100, 4), max_running=2, max_batch_tokens=64)
    first, second, third = (sequence(3, 2) for _ in range(3))
    for each in (first, second, third):
        scheduler.add(each)
    batch = scheduler.schedule()
    assert batch is not None
    assert [chunk.sequence for chunk in batch.chunks] == [first, second]


def test_decode_rows_go_before_prefill_chunks() -> None:
    scheduler = Scheduler(BlockPool(100, 4), max_running=4, max_batch_tokens=8)
    short, long = sequence(2, 5), sequence(30, 5)
    scheduler.add(short)
    scheduler.add(long)
    lengths = []
    for _ in range(3):
        batch = scheduler.schedule()
        assert batch is not None
        lengths.append([chunk.length for chunk in batch.chunks])
        scheduler.commit(batch)
        short.tokens.append(0)
    assert lengths == [[2, 6], [1, 7], [1, 7]]


def run_step(scheduler: Scheduler) -> Batch:
    """One step as the engine makes it; every sequence that samples gets token 0."""
    batch = scheduler.schedule()
    assert batch is not None
    sampling = [chunk.sequence for chunk in batch.chunks if chunk.samples]
    scheduler.commit(batch)
    for each in sampling:
        each.tokens.append(0)
    return batch


def test_a_prompt_that_enters_takes_small_chunks_beside_others_and_large_ones_alone() -> None:
    scheduler = Scheduler(BlockPool(100, 4), max_running=4, max_batch_tokens=64, prefill_chunk_tokens=9)
    scheduler.add(sequence(2, 50))
    run_step(scheduler)
    scheduler.add(sequence(25, 50))
    assert [[chunk.length for chunk in run_step(scheduler).chunks] for _ in range(4)] == [[1, 10], [1, 10], [1, 5], [1, 1]]
    crowd = Scheduler(BlockPool(100, 4), max_running=4, max_batch_tokens=64, prefill_chunk_tokens=9)
    crowd.add(sequence(2, 50))
    run_step(crowd)
    for number in range(1, 10):  # of different prompts: one that could share another's would wait for it
        crowd.add(sequence(tuple(range(100 * number, 100 * number + 25)), 50))
    assert [chunk.length for chunk in run_step(crowd).chunks] == [1, 25, 25, 5], "three have a place: 1 + 9 + 18 + 27"
    alone = Scheduler(BlockPool(100, 4), max_running=4, max_batch_tokens=64, prefill_chunk_tokens=9)
    alone.add(sequence(70, 50))
    assert [[chunk.length for chunk in run_step(alone).chunks] for _ in range(2)] == [[64], [6]]


def test_the_same_prompt_again_runs_only_what_is_not_in_full_blocks() -> None:
    scheduler = Scheduler(BlockPool(100, 4), max_running=4, max_batch_tokens=64)
    first, same, longer, other = sequence(12, 5), sequence(12, 5), sequence(18, 5), sequence(12, 5, CHOICES[1])
    scheduler.add(first)
    run_step(scheduler)
    for each in (same, longer, other):
        scheduler.add(each)
    chunks = {chunk.sequence: (chunk.start, chunk.length) for chunk in run_step(scheduler).chunks}
    assert chunks == {first: (12, 1), same: (8, 4), longer: (12, 6), other: (0, 12)}
    assert (scheduler.prefix_stats.hits, scheduler.prefix_stats.misses, scheduler.prefix_stats.reused_tokens) == (2, 2, 20)
    scheduler.check_integrity()


@pytest.mark.parametrize(("prefix_cache", "group", "is_shared"), [(True, None, True), (False, "g", True), (False, None, False)])
def test_sequences_of_one_prompt_share_its_prefill_though_they_come_at_once(
    prefix_cache: bool, group: str | None, is_shared: bool
) -> None:
    scheduler = Scheduler(BlockPool(100, 4), max_running=8, max_batch_tokens=24, prefix_cache=prefix_cache)
    four = [sequence(42, 5, None, group) for _ in range(4)]
    for each in four:
        scheduler.add(each)
    prompt_tokens = 0
    while any(each.generated == 0 for each in four):
        prompt_tokens += sum(chunk.length for chunk in run_step(scheduler).chunks if not chunk.is_decode)
        scheduler.check_integrity()
    assert prompt_tokens == (42 + 3 * 2 if is_shared else 4 * 42)


def test_what_must_be_repeatable_shares_no_keys_with_what_may_run_merged() -> None:
    scheduler = Scheduler(BlockPool(100, 4), max_running=4, max_batch_tokens=64)
    sampling = SamplingParams(max_new_tokens=5, do_sample=True, is_repeatable=True)
    free = sequence(12, 5, CHOICES[1])
    known, again = (Sequence(GenerationRequest("r", free.request.prompt_ids, sampling, CHOICES[1])) for _ in range(2))
    starts = []
    for each in (free, known, again):
        scheduler.add(each)
        starts.append(run_step(scheduler).chunks[0].start)
        scheduler.finish(each)
    assert starts == [0, 0, 8]


def test_whose_prefill_others_wait_for_may_be_aborted() -> None:
    scheduler = Scheduler(BlockPool(100, 4), max_running=8, max_batch_tokens=24)
    first, second = sequence(42, 5), sequence(42, 5)
    scheduler.add(first)
    scheduler.add(second)
    run_step(scheduler)
    scheduler.finish(first)
    chunks = run_step(scheduler).chunks
    assert [(chunk.sequence, chunk.start, chunk.end) for chunk in chunks] == [(second, 24, 42)]


@pytest.mark.parametrize(
    ("flooding", "other"),
    [((CHOICES[1], None), (CHOICES[3], None)), ((None, "alice"), (None, "bob"))],
    ids=["of an adapter", "of a tenant"],
)
def test_a_flood_delays_others_by_one_prompt(
    flooding: tuple[AdapterChoice | None, str | None], other: tuple[AdapterChoice | None, str | None]
) -> None:
    scheduler = Scheduler(BlockPool(1000, 4), max_running=1, max_batch_tokens=64)
    flood = [sequence(40, 1, flooding[0], tenant=flooding[1]) for _ in range(20)]
    for each in flood:
        scheduler.add(each)
    admitted = []
    late = sequence(40, 1, other[0], tenant=other[1])
    for number in range(6):
        if number == 3:
            scheduler.add(late)
        batch = run_step(scheduler)
        admitted += [chunk.sequence for chunk in batch.chunks]
        scheduler.finish(batch.chunks[0].sequence)
    assert admitted.index(late) in (3, 4)


def test_long_answers_count_as_long_prompts_do() -> None:
    scheduler = Scheduler(BlockPool(1000, 4), max_running=2, max_batch_tokens=64, prefix_cache=False)
    kinds = {"a": (CHOICES[1], 4, 36), "b": (CHOICES[3], 36, 4)}  # prompt tokens, answer tokens
    made: dict[str | None, int] = dict.fromkeys(kinds, 0)
    for _ in range(2000):
        for choice, prompt, new in kinds.values():
            while sum(each.version == choice.version for each in scheduler.sequences()) < 4:
                scheduler.add(sequence(prompt, new, choice))
        for chunk in run_step(scheduler).chunks:
            each = chunk.sequence
            if each.generated == each.request.sampling.max_new_tokens:
                scheduler.finish(each)
                made[each.version] += 1
    assert made["a"] > 50
    assert abs(made["a"] - made["b"]) <= 3


def test_the_youngest_gives_way_and_comes_back_before_all_others() -> None:
    pool = BlockPool(6, 2)
    scheduler = Scheduler(pool, max_running=2, max_batch_tokens=16, prefix_cache=False)
    old, young, later = sequence(5, 7), sequence(3, 7), sequence(2, 1)
    for each in (old, young, later):
        scheduler.add(each)
    while not young.preemptions:
        run_step(scheduler)
    assert (old.preemptions, young.computed, young.blocks, scheduler.waiting) == (0, 0, [], 2)
    made = young.generated
    while old.generated < 7:
        run_step(scheduler)
        assert scheduler.running == 1
    scheduler.finish(old)
    batch = run_step(scheduler)
    assert batch.chunks[0] == Chunk(young, 0, 3 + made)


def test_sequences_that_do_not_fit_side_by_side_do_not_keep_throwing_each_other_out() -> None:
    scheduler = Scheduler(BlockPool(8, 2), max_running=4, max_batch_tokens=16, prefix_cache=False)
    live = [sequence(4, 12, choice) for choice in CHOICES]  # each needs all eight blocks in the end
    for each in live:
        scheduler.add(each)
    steps = 0
    while live:
        run_step(scheduler)
        steps += 1
        for each in [each for each in live if each.generated == 12]:
            live.remove(each)
            scheduler.finish(each)
            assert each.preemptions <= 3  # at most once for each that is older
    assert steps <= 4 * 12


def test_nobody_is_admitted_into_the_space_that_the_next_tokens_of_others_need() -> None:
    scheduler = Scheduler(BlockPool(5, 2), max_running=4, max_batch_tokens=16)
    scheduler.add(sequence(6, 4))
    scheduler.add(sequence((7, 7, 7), 2))
    run_step(scheduler)
    assert (scheduler.running, scheduler.waiting) == (1, 1)


def test_a_budget_below_the_row_limit_is_refused() -> None:
    with pytest.raises(ValueError, match="max_batch_tokens"):
        Scheduler(BlockPool(3, 2), max_running=4, max_batch_tokens=3)
