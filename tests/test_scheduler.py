"""The scheduler under any order of arrivals, steps and aborts: blocks are never lost, and every request ends."""

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from service.core import GenerationRequest, SamplingParams
from service.engine.blocks import BlockPool, OutOfBlocks
from service.engine.scheduler import Scheduler, Sequence


def sequence(prompt: int, new: int) -> Sequence:
    return Sequence(GenerationRequest("r", tuple(range(prompt)), SamplingParams(max_new_tokens=new)))


class SchedulerMachine(RuleBasedStateMachine):
    """Plays the engine: runs scheduled batches, appends a token to what sampled, ends what is complete."""

    @initialize(
        blocks=st.integers(3, 12), block_tokens=st.integers(1, 5), max_running=st.integers(1, 6), extra=st.integers(0, 12)
    )
    def make(self, blocks: int, block_tokens: int, max_running: int, extra: int) -> None:
        self.pool = BlockPool(blocks, block_tokens)
        self.max_running = max_running
        self.budget = max_running + extra
        self.scheduler = Scheduler(self.pool, max_running=max_running, max_batch_tokens=self.budget)
        self.live: list[Sequence] = []

    @rule(prompt=st.integers(1, 40), new=st.integers(1, 12))
    def arrive(self, prompt: int, new: int) -> None:
        if prompt + new <= self.pool.capacity_tokens:  # the engine refuses what can never fit
            self.live.append(sequence(prompt, new))
            self.scheduler.add(self.live[-1])

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        gone = data.draw(st.sampled_from(self.live))
        self.live.remove(gone)
        self.scheduler.finish(gone)

    @rule()
    def step(self) -> None:
        batch = self.scheduler.schedule()
        if batch is None:
            assert not self.live, "requests are there but nothing runs"
            return
        assert sum(chunk.length for chunk in batch.chunks) <= self.budget
        assert len({id(chunk.sequence) for chunk in batch.chunks}) == len(batch.chunks) <= self.max_running
        for chunk in batch.chunks:
            assert chunk.start == chunk.sequence.computed
            assert chunk.end <= len(chunk.sequence.blocks) * self.pool.block_tokens
        sampling = [chunk.sequence for chunk in batch.chunks if chunk.samples]
        self.scheduler.commit(batch)
        for each in sampling:
            each.tokens.append(0)
            if each.generated == each.request.sampling.max_new_tokens:
                self.live.remove(each)
                self.scheduler.finish(each)

    @invariant()
    def nothing_is_lost(self) -> None:
        if hasattr(self, "scheduler"):
            self.scheduler.check_integrity()
            assert self.scheduler.running + self.scheduler.waiting == len(self.live)

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        # Whatever the state, all that is left ends, and in no more steps than running it one after the other would take.
        bound = sum(len(each.tokens) + each.request.sampling.max_new_tokens for each in self.live) + 1
        for _ in range(bound):
            self.step()
        assert not self.live
        assert self.pool.free == self.pool.total


TestScheduler = SchedulerMachine.TestCase


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


def test_the_youngest_gives_way_and_is_computed_again_from_its_first_token() -> None:
    pool = BlockPool(4, 2)
    scheduler = Scheduler(pool, max_running=2, max_batch_tokens=16)
    old, young = sequence(4, 4), sequence(4, 4)
    scheduler.add(old)
    scheduler.add(young)
    for _ in range(2):
        batch = scheduler.schedule()
        assert batch is not None
        scheduler.commit(batch)
        for chunk in batch.chunks:
            chunk.sequence.tokens.append(0)
    assert (old.preemptions, young.preemptions) == (0, 1)
    assert (young.computed, young.generated, scheduler.waiting) == (0, 1, 1)


def test_a_pool_hands_out_all_or_nothing() -> None:
    pool = BlockPool(3, 2)
    with pytest.raises(OutOfBlocks):
        pool.allocate(4)
    assert pool.free == 3
    taken = pool.allocate(3)
    with pytest.raises(AssertionError):
        pool.check_integrity([taken[:2]])
    with pytest.raises(AssertionError):
        pool.check_integrity([taken, taken[:1]])
    pool.release(taken)
    pool.check_integrity([])


def test_a_budget_below_the_row_limit_is_refused() -> None:
    with pytest.raises(ValueError, match="max_batch_tokens"):
        Scheduler(BlockPool(3, 2), max_running=4, max_batch_tokens=3)
