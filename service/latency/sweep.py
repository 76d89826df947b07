"""A short sweep at start-up: made-up requests through the real engine, so that the latency model knows more than one load.

The model is an observer of the engine, so the sweep only has to bring about steps that differ: few and many rows, base and
adapters, low and high ranks, prompts alone and beside rows that generate. It measures whatever else runs meanwhile as well,
and is none the worse for it.
"""

import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from adapters.adapter import Adapter, LowRank
from adapters.config import AdapterConfig, AdapterKind
from service.core import AdapterChoice, EngineProtocol, Event, GenerationRequest, SamplingParams, TokenEvent
from service.errors import ServiceError

RANKS = (64, 16, 4, 1)
MAX_ADAPTERS = 8
MAX_FACTOR_BYTES = 256 << 20
"""Of all made-up adapters together; of a large model there are fewer, of lower rank."""
_NEW_TOKENS = 6
_MERGING_TOKENS = 32
_SCALE = 1e-3
"""Of the random factors: small, so that no activation overflows."""


@dataclass(frozen=True)
class Wave:
    """Requests sent together.

    Attributes:
        rows: their number.
        adapters: how many distinct ones they use; 0 for the base alone.
        rank: of all of them.
        new_tokens: made by each.
    """

    rows: int
    adapters: int = 0
    rank: int = 0
    new_tokens: int = _NEW_TOKENS


PLAN = (
    Wave(1),
    Wave(16, 8, 64),
    Wave(16),
    Wave(4, 4, 16),
    Wave(16, 8, 4),
    Wave(1, 1, 64),
    Wave(4),
    Wave(32, 8, 64),
    Wave(8, 8, 16),
    Wave(32),
    Wave(4, 1, 64),
    Wave(32, 8, 4),
    Wave(8, 2, 64),
    Wave(2, 2, 1),
    Wave(64, 8, 16),
    Wave(64),
    # One pair alone for long enough to be merged.
    Wave(1, 1, 16, new_tokens=_MERGING_TOKENS),
    Wave(8, 1, 16, new_tokens=_MERGING_TOKENS),
)
"""What tells most comes first, since a slow machine will not reach the end."""


def sweep(
    engine: EngineProtocol,
    *,
    max_running: int,
    seconds: float,
    should_stop: Callable[[], bool] = lambda: False,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> int:
    """Send the plan's waves, until the time is over.

    Args:
        engine: started; the latency model is its observer.
        max_running: no wave has more rows.
        seconds: no wave begins after so many.
        should_stop: asked before each wave.
        progress: told how many waves are done, and of how many.

    Returns:
        The number of waves sent.
    """
    ends_at = time.monotonic() + seconds
    rng = random.Random(0)
    with synthetic_adapters(engine, count=MAX_ADAPTERS, rank=RANKS[0]) as versions:
        for done, wave in enumerate(PLAN):
            if should_stop() or time.monotonic() > ends_at:
                return done
            if wave.adapters <= len(versions):
                _send(engine, wave, min(wave.rows, max_running), versions, rng)
            progress(done + 1, len(PLAN))
    return len(PLAN)


@contextmanager
def synthetic_adapters(
    engine: EngineProtocol, *, count: int, rank: int, most_bytes: int = MAX_FACTOR_BYTES
) -> Iterator[list[str]]:
    """Load made-up DyLoRAs over the modules that real ones may adapt, all with the same factors; gone at the end.

    Gives their versions: `count`, or fewer where `most_bytes` do not hold so many.
    """
    shapes = engine.adaptable_modules()
    per_rank = sum(4 * (inputs + outputs) for inputs, outputs in shapes.values())
    count = min(count, most_bytes // (rank * per_rank)) if per_rank else 0
    versions = [f"latency-sweep-{number}" for number in range(count)]
    generator = torch.Generator().manual_seed(0)

    def factor(*shape: int) -> torch.Tensor:
        return _SCALE * torch.randn(*shape, generator=generator)

    if versions:
        modules = {path: LowRank(factor(rank, i), factor(o, rank)) for path, (i, o) in shapes.items()}
        adapter = Adapter(AdapterConfig(AdapterKind.DYLORA, rank, alpha=1.0), modules)
        for version in versions:
            engine.load(version, adapter)
    try:
        yield versions
    finally:
        for version in versions:
            engine.unload(version)


def _send(engine: EngineProtocol, wave: Wave, rows: int, versions: Sequence[str], rng: random.Random) -> None:
    """Send a wave and wait for its end: two thirds first, the rest when these generate, so that prompts enter beside them."""
    late = rows // 3
    first = _Group(engine, rows - late)
    for number in range(rows - late):
        first.submit(_request(engine, wave, number, versions, rng))
    first.wait_generating()
    rest = _Group(engine, late)
    for number in range(rows - late, rows):
        rest.submit(_request(engine, wave, number, versions, rng))
    first.wait_ended()
    rest.wait_ended()


def _request(engine: EngineProtocol, wave: Wave, number: int, versions: Sequence[str], rng: random.Random) -> GenerationRequest:
    facts = engine.model
    length = max(1, min(rng.choice((8, 24, 64, 200)), facts.max_context_tokens - wave.new_tokens))
    choice = None
    if wave.adapters:
        choice = AdapterChoice(versions[number % wave.adapters], wave.rank, scale=1.0 / wave.rank)
    return GenerationRequest(
        f"latency-sweep-{rng.getrandbits(64):x}",
        tuple(rng.randrange(facts.vocab_size) for _ in range(length)),
        SamplingParams(max_new_tokens=min(wave.new_tokens, facts.max_context_tokens - length), ignore_eos=True),
        choice,
    )


class _Group:
    """Requests that are waited for together; those that the engine does not take, or fails, count as ended."""

    def __init__(self, engine: EngineProtocol, size: int) -> None:
        self._engine = engine
        self._changed = threading.Condition()
        self._size = size
        self._generating: set[str] = set()
        self._ended = 0

    def submit(self, request: GenerationRequest) -> None:
        try:
            self._engine.submit(request, self._on_event)
        except ServiceError:
            with self._changed:
                self._ended += 1

    def wait_generating(self) -> None:
        """Until each has made a token or has ended."""
        with self._changed:
            self._changed.wait_for(lambda: len(self._generating) + self._ended >= self._size)

    def wait_ended(self) -> None:
        """Until each has ended."""
        with self._changed:
            self._changed.wait_for(lambda: self._ended >= self._size)

    def _on_event(self, event: Event) -> None:
        with self._changed:
            if isinstance(event, TokenEvent):
                self._generating.add(event.request_id)
            else:
                self._ended += 1
                self._generating.discard(event.request_id)
            self._changed.notify_all()
