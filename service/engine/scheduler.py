"""Which tokens run in the next step. Pure bookkeeping: no torch, no clock, no thread."""

from collections import deque
from dataclasses import dataclass, field

from service.core import AdapterChoice, GenerationRequest, Mode, PrefixStats, StepReport
from service.engine.blocks import BlockPool, OutOfBlocks
from service.engine.fair_queue import FairQueue
from service.engine.prefix_hash import PrefixHash
from service.prefill import prompt_tokens_beside


@dataclass(eq=False)
class Sequence:
    """A request on its way through the engine.

    Attributes:
        choice: the adapter and the rank of the tokens that are computed next; it may change while the sequence runs.
        tokens: the prompt and all that was generated.
        computed: how many of `tokens`, from the first, have their keys and values in the cache.
        blocks: the cache blocks held, in order of position.
        digests: of the first full blocks of `tokens`, as far as they were needed; they stay right as tokens are added.
        is_pure: whether all that is computed was computed at `choice`, so that others may find it under that name.
        preemptions: how often its cache was given up and computed again.
        prompt_logprobs: of the prompt's tokens from the second on, as far as they are known; empty unless asked for.
        prompt_alternatives: beside them, the most probable tokens' ids and log-probabilities.
    """

    request: GenerationRequest
    choice: AdapterChoice | None = field(init=False)
    tokens: list[int] = field(init=False)
    computed: int = 0
    blocks: list[int] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)
    is_pure: bool = True
    preemptions: int = 0
    prompt_logprobs: list[float] = field(default_factory=list)
    prompt_alternatives: list[tuple[tuple[int, float], ...]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.choice = self.request.adapter
        self.tokens = list(self.request.prompt_ids)

    def change_rank(self, choice: AdapterChoice) -> None:
        """Go on at another rank of the same adapter; what is computed stays."""
        if choice != self.choice:
            self.choice = choice
            self.is_pure = not self.computed
            self.digests = []

    def forget_computed(self) -> None:
        """Begin again, at the rank that it has now."""
        self.blocks = []
        self.computed = 0
        if not self.is_pure:
            self.is_pure = True
            self.digests = []

    @property
    def flow(self) -> tuple[str | None, str | None]:
        """With whom it shares its turns in the queue: those of its tenant for its adapter."""
        return self.request.tenant, self.version

    @property
    def generated(self) -> int:
        """Number of tokens generated so far."""
        return len(self.tokens) - len(self.request.prompt_ids)

    @property
    def pending(self) -> int:
        """Tokens whose keys and values are still to be computed."""
        return len(self.tokens) - self.computed

    @property
    def first_needed(self) -> int:
        """The first token whose logits are needed: the last, or one before it whose successor's probability is asked for."""
        last_of_prompt = len(self.request.prompt_ids) - 1
        if self.request.sampling.prompt_logprobs and len(self.prompt_logprobs) < last_of_prompt:
            return len(self.prompt_logprobs)
        return len(self.tokens) - 1

    @property
    def is_repeatable(self) -> bool:
        """Whether all of it has to run in one mode, whatever runs beside it."""
        sampling = self.request.sampling
        return sampling.is_repeatable and sampling.do_sample and self.choice is not None

    @property
    def version(self) -> str | None:
        """The adapter it runs with, whatever the rank."""
        return self.choice.version if self.choice is not None else None


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

    @property
    def is_decode(self) -> bool:
        """Whether it is one generated token, and no part of a prompt or of what is computed again."""
        return self.length == 1 and self.start >= len(self.sequence.request.prompt_ids)


@dataclass(frozen=True)
class Batch:
    """What one step runs: decode rows and prefill chunks side by side."""

    chunks: tuple[Chunk, ...]

    @property
    def pairs(self) -> frozenset[AdapterChoice | None]:
        """The distinct (adapter, rank) of its rows; None stands for the base alone."""
        return frozenset(chunk.sequence.choice for chunk in self.chunks)

    def report(self, mode: Mode, seconds: float, pause_s: float = 0.0) -> StepReport:
        """The step that it was; see there."""
        decodes = sum(chunk.is_decode for chunk in self.chunks)
        ranks: dict[str, int] = {}
        row_ranks = 0
        for chunk in self.chunks:
            choice = chunk.sequence.choice
            if choice is not None:
                ranks[choice.version] = max(choice.rank, ranks.get(choice.version, 0))
                row_ranks += chunk.length * choice.rank
        return StepReport(
            mode,
            prefill_tokens=sum(chunk.length for chunk in self.chunks) - decodes,
            decode_rows=decodes,
            seconds=seconds,
            columns=sum(ranks.values()),
            row_ranks=row_ranks,
            adapters=len(ranks),
            context_tokens=sum(chunk.end for chunk in self.chunks),
            pause_s=pause_s,
        )


class Scheduler:
    """Continuous batching: every running sequence advances in every step; waiting ones are admitted fairly.

    A step holds a row of every sequence that generates, then prompt tokens up to what is left of the budget. Where sequences
    generate, they wait for the step's prompt tokens, so those are bounded once more: see `prompt_tokens_beside`.

    Admission is by space for the whole prompt, so a prefill that has begun never stops for want of memory. Who is next is
    decided across pairs of tenant and adapter by the tokens that were computed for each, of prompts and of answers (see
    `FairQueue`). Nobody passes one for whom there is no space yet, nor one whose next block a running sequence is about to
    compute: so several answers to one prompt take one prefill, and since that uses up the budget of all its steps but the
    last, those behind lose at most a step. When a generating sequence finds no free block, the one admitted last gives up its
    blocks and waits, before all others, to be computed again: it loses time, never tokens.

    Invariant: running sequences, followed by those preempted, stand in order of first admission. So the first is never
    preempted, and since `add` accepts only what fits the empty cache it always advances: nothing starves or turns in circles.
    """

    def __init__(
        self,
        pool: BlockPool,
        *,
        max_running: int,
        max_batch_tokens: int,
        prefill_chunk_tokens: int | None = None,
        prefix_cache: bool = True,
    ) -> None:
        """Begin with nothing to do.

        Args:
            pool: the blocks to give out.
            max_running: sequences that hold blocks at one time.
            max_batch_tokens: tokens of one step.
            prefill_chunk_tokens: of a prompt that enters alone beside others that generate, and one more for each of these;
                None: no bound but `max_batch_tokens`.
            prefix_cache: start where an earlier sequence of the same adapter and rank has computed the same first blocks;
                False: only where it is of the same group. Right for sliding windows as well, since the cache keeps every
                position and a window only hides some.
        """
        if max_batch_tokens < max_running:
            raise ValueError(f"max_batch_tokens ({max_batch_tokens}) must be at least max_running ({max_running})")
        self._pool = pool
        self._max_running = max_running
        self._max_batch_tokens = max_batch_tokens
        self._prefill_chunk_tokens = prefill_chunk_tokens or max_batch_tokens
        self._prefix_hash = PrefixHash(pool.block_tokens)
        self._prefix_cache = prefix_cache
        self._running: list[Sequence] = []
        self._preempted: deque[Sequence] = deque()
        self._queue: FairQueue[Sequence] = FairQueue()
        self._hits = self._misses = self._reused_tokens = 0

    @property
    def running(self) -> int:
        """Sequences that hold cache blocks."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Sequences in the queue."""
        return len(self._preempted) + len(self._queue)

    @property
    def prefix_stats(self) -> PrefixStats:
        """What prefix reuse did since start."""
        return PrefixStats(self._hits, self._misses, self._pool.evictions, self._reused_tokens)

    def add(self, sequence: Sequence) -> None:
        """Put a sequence at the end of its flow's queue."""
        self._queue.add(sequence.flow, sequence)

    def schedule(self) -> Batch | None:
        """Choose the next step's chunks and give them their blocks; None if there is nothing to do."""
        chunks = self._decodes()
        budget = self._max_batch_tokens - len(chunks)
        if chunks:
            budget = min(budget, prompt_tokens_beside(len(chunks), self._entering(), self._prefill_chunk_tokens))
        for sequence in self._running:
            if sequence.pending > 1 and budget > 0:
                chunks.append(self._prefill(sequence, budget))
                budget -= chunks[-1].length
        while budget > 0 and (admitted := self._admit()) is not None:
            chunks.append(self._prefill(admitted, budget))
            budget -= chunks[-1].length
        return Batch(tuple(chunks)) if chunks else None

    def commit(self, batch: Batch) -> None:
        """Record that the batch's keys and values are in the cache. Call before appending the sampled tokens."""
        for chunk in batch.chunks:
            chunk.sequence.computed = chunk.end
            if chunk.is_decode:  # a prompt's tokens were counted when it was admitted
                self._queue.count(chunk.sequence.flow, 1)
            if self._may_share(chunk.sequence):
                self._name_blocks(chunk)

    def finish(self, sequence: Sequence) -> None:
        """Remove a sequence, wherever it stands, and take back its blocks."""
        if sequence in self._running:
            self._running.remove(sequence)
        elif sequence in self._preempted:
            self._preempted.remove(sequence)
        else:
            self._queue.remove(sequence.flow, sequence)
        self._release(sequence)

    def sequences(self) -> list[Sequence]:
        """All sequences: running, preempted, waiting."""
        return [*self._running, *self._preempted, *self._queue.items()]

    def check_integrity(self) -> None:
        """Assert that every block is accounted for, and that each running sequence holds what its tokens need."""
        self._pool.check_integrity([sequence.blocks for sequence in self._running])
        for sequence in self._running:
            if len(sequence.blocks) * self._pool.block_tokens < sequence.computed:
                raise AssertionError("a running sequence holds fewer blocks than its tokens need")
        if any(sequence.blocks or sequence.computed for sequence in [*self._preempted, *self._queue.items()]):
            raise AssertionError("a waiting sequence holds blocks")

    def _decodes(self) -> list[Chunk]:
        """A row of every sequence whose last token alone is to be computed."""
        chunks = []
        for sequence in list(self._running):
            if sequence.pending == 1 and sequence in self._running and self._reserve(sequence):
                chunks.append(Chunk(sequence, sequence.computed, 1))
        return chunks

    def _entering(self) -> int:
        """Prompts that are being read, or wait and have a place."""
        reading = sum(sequence.pending > 1 for sequence in self._running)
        return reading + min(self.waiting, self._max_running - len(self._running))

    def _prefill(self, sequence: Sequence, budget: int) -> Chunk:
        return Chunk(sequence, sequence.computed, min(sequence.pending, budget))

    def _admit(self) -> Sequence | None:
        """Move the sequence that is next from the queue to the running ones; None if there is none, or no space for it."""
        if len(self._running) >= self._max_running or not self.waiting:
            return None
        sequence = self._preempted[0] if self._preempted else self._queue.head()
        if not self._place(sequence):
            return None
        if self._preempted:
            self._preempted.popleft()  # its adapter was charged when it was first admitted
        else:
            self._queue.take(cost=sequence.pending)
        self._running.append(sequence)
        return sequence

    def _place(self, sequence: Sequence) -> bool:
        """Give a sequence the blocks for all its tokens, those of a known prefix first; False if it has to wait."""
        shared = self._share_prefix(sequence)
        missing = self._pool.blocks_for(len(sequence.tokens)) - len(shared)
        # A block for each of the others: who is admitted only to be preempted by their next tokens was computed in vain.
        if missing + len(self._running) > self._pool.available or self._is_in_the_making(sequence, len(shared)):
            self._pool.release(shared)
            return False
        sequence.blocks = shared + self._pool.allocate(missing)
        sequence.computed = len(shared) * self._pool.block_tokens
        if self._may_share(sequence):
            self._hits += bool(shared)
            self._misses += not shared
            self._reused_tokens += sequence.computed
        return True

    def _may_share(self, sequence: Sequence) -> bool:
        return sequence.is_pure and (self._prefix_cache or sequence.request.group is not None)

    def _share_prefix(self, sequence: Sequence) -> list[int]:
        most = self._reusable_blocks(sequence)
        self._extend_digests(sequence, most)
        return self._pool.share(sequence.digests[:most])

    def _reusable_blocks(self, sequence: Sequence) -> int:
        return sequence.first_needed // self._pool.block_tokens if self._may_share(sequence) else 0

    def _is_in_the_making(self, sequence: Sequence, number: int) -> bool:
        """Whether a running sequence is about to compute the block `number` of this one's prompt."""
        if number >= self._reusable_blocks(sequence):
            return False
        end = (number + 1) * self._pool.block_tokens
        for other in self._running:
            if other.computed < end <= len(other.tokens) and self._may_share(other):
                self._extend_digests(other, number + 1)
                if other.digests[number] == sequence.digests[number]:
                    return True
        return False

    def _extend_digests(self, sequence: Sequence, blocks: int) -> None:
        group = None if self._prefix_cache else sequence.request.group
        among = (group, sequence.is_repeatable)  # merged steps, which others may have run, round otherwise
        self._prefix_hash.extend(sequence.digests, sequence.tokens, sequence.choice, blocks=blocks, among=among)

    def _name_blocks(self, chunk: Chunk) -> None:
        """Let others find the blocks that a chunk has filled."""
        sequence, size = chunk.sequence, self._pool.block_tokens
        filled = range(chunk.start // size, chunk.end // size)
        self._extend_digests(sequence, filled.stop)
        for number in filled:
            self._pool.name(sequence.blocks[number], sequence.digests[number], sequence.version)

    def _reserve(self, sequence: Sequence) -> bool:
        """Give `sequence` the block for its next token; False if it had to be preempted itself."""
        while len(sequence.blocks) < self._pool.blocks_for(sequence.computed + 1):
            try:
                sequence.blocks += self._pool.allocate(1)
            except OutOfBlocks:
                victim = self._running.pop()
                self._release(victim)
                victim.preemptions += 1
                self._preempted.appendleft(victim)
                if victim is sequence:
                    return False
        return True

    def _release(self, sequence: Sequence) -> None:
        self._pool.release(sequence.blocks)
        sequence.forget_computed()
