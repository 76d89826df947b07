"""Which tokens run in the next step. Pure bookkeeping: no torch, no clock, no thread."""

from collections import deque
from dataclasses import dataclass, field

from service.core import AdapterChoice, GenerationRequest
from service.engine.blocks import BlockPool, OutOfBlocks


@dataclass(eq=False)
class Sequence:
    """A request on its way through the engine.

    Attributes:
        tokens: the prompt and all that was generated.
        computed: how many of `tokens`, from the first, have their keys and values in the cache.
        blocks: the cache blocks held, in order of position.
        preemptions: how often its cache was given up and computed again.
    """

    request: GenerationRequest
    tokens: list[int] = field(init=False)
    computed: int = 0
    blocks: list[int] = field(default_factory=list)
    preemptions: int = 0

    def __post_init__(self) -> None:
        self.tokens = list(self.request.prompt_ids)

    @property
    def generated(self) -> int:
        """Number of tokens generated so far."""
        return len(self.tokens) - len(self.request.prompt_ids)

    @property
    def pending(self) -> int:
        """Tokens whose keys and values are still to be computed."""
        return len(self.tokens) - self.computed

    @property
    def adapter(self) -> AdapterChoice | None:
        """The adapter and rank it runs with."""
        return self.request.adapter


@dataclass(frozen=True)
class Chunk:
    """Consecutive tokens of one sequence that run in one step: `sequence.tokens[start : start + length]`."""

    sequence: Sequence
    start: int
    length: int

    @property
    def end(self) -> int:
        """Position after the last token."""
        return self.start + self.length

    @property
    def samples(self) -> bool:
        """Whether its last token is the sequence's last, so that the next token is sampled from it."""
        return self.end == len(self.sequence.tokens)


@dataclass(frozen=True)
class Batch:
    """What one step runs: decode rows and prefill chunks side by side."""

    chunks: tuple[Chunk, ...]

    @property
    def pairs(self) -> frozenset[AdapterChoice | None]:
        """The distinct (adapter, rank) of its rows; None stands for the base alone."""
        return frozenset(chunk.sequence.adapter for chunk in self.chunks)


class Scheduler:
    """Continuous batching: first come, first admitted; every running sequence advances in every step.

    Decode rows go first, then prefill chunks of running sequences, then waiting ones are admitted while the token budget,
    the row limit and the cache allow. When a decode row finds no free block, the sequence admitted last gives up its
    blocks and waits, at the head of the queue, to be computed again: it loses time, never tokens.

    Invariant: the oldest running sequence is never preempted for another, and `add` accepts only what fits the empty
    cache, so it always advances and nothing starves.
    """

    def __init__(self, pool: BlockPool, *, max_running: int, max_batch_tokens: int) -> None:
        if max_batch_tokens < max_running:
            raise ValueError(f"max_batch_tokens ({max_batch_tokens}) must be at least max_running ({max_running})")
        self._pool = pool
        self._max_running = max_running
        self._max_batch_tokens = max_batch_tokens
        self._running: list[Sequence] = []
        self._waiting: deque[Sequence] = deque()

    @property
    def running(self) -> int:
        """Sequences that hold cache blocks."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Sequences in the queue."""
        return len(self._waiting)

    def add(self, sequence: Sequence) -> None:
        """Put a sequence at the end of the queue."""
        self._waiting.append(sequence)

    def schedule(self) -> Batch | None:
        """Choose the next step's chunks and give them their blocks; None if there is nothing to do."""
        chunks: list[Chunk] = []
        budget = self._max_batch_tokens
        for sequence in list(self._running):
            if sequence.pending == 1 and sequence in self._running and self._reserve(sequence, sequence.computed + 1):
                chunks.append(Chunk(sequence, sequence.computed, 1))
                budget -= 1
        for sequence in self._running:
            if sequence.pending > 1 and budget > 0:
                length = min(sequence.pending, budget)
                chunks.append(Chunk(sequence, sequence.computed, length))
                budget -= length
        while self._waiting and budget > 0 and len(self._running) < self._max_running:
            sequence = self._waiting[0]
            try:
                # The whole prompt's blocks at once: a prefill that has begun never has to stop for want of memory.
                sequence.blocks = self._pool.allocate(self._pool.blocks_for(len(sequence.tokens)))
            except OutOfBlocks:
                break
            self._running.append(self._waiting.popleft())
            length = min(sequence.pending, budget)
            chunks.append(Chunk(sequence, 0, length))
            budget -= length
        return Batch(tuple(chunks)) if chunks else None

    def commit(self, batch: Batch) -> None:
        """Record that the batch's keys and values are in the cache. Call before appending the sampled tokens."""
        for chunk in batch.chunks:
            chunk.sequence.computed = chunk.end

    def finish(self, sequence: Sequence) -> None:
        """Remove a sequence, wherever it stands, and take back its blocks."""
        if sequence in self._running:
            self._running.remove(sequence)
        else:
            self._waiting.remove(sequence)
        self._release(sequence)

    def sequences(self) -> list[Sequence]:
        """All sequences, running first."""
        return [*self._running, *self._waiting]

    def check_integrity(self) -> None:
        """Assert that no block is lost or shared, and that each running sequence holds what its tokens need."""
        self._pool.check_integrity([sequence.blocks for sequence in self._running])
        for sequence in self._running:
            if len(sequence.blocks) * self._pool.block_tokens < sequence.computed:
                raise AssertionError("a running sequence holds fewer blocks than its tokens need")
        if any(sequence.blocks or sequence.computed for sequence in self._waiting):
            raise AssertionError("a waiting sequence holds blocks")

    def _reserve(self, sequence: Sequence, tokens: int) -> bool:
        """Give `sequence` the blocks for its first `tokens` tokens; False if it had to be preempted itself."""
        while (missing := self._pool.blocks_for(tokens) - len(sequence.blocks)) > 0:
            try:
                sequence.blocks += self._pool.allocate(missing)
            except OutOfBlocks:
                victim = self._running.pop()
                self._release(victim)
                victim.preemptions += 1
                self._waiting.appendleft(victim)
                if victim is sequence:
                    return False
        return True

    def _release(self, sequence: Sequence) -> None:
        self._pool.release(sequence.blocks)
        sequence.blocks = []
        sequence.computed = 0
