"""The engine: one thread owns scheduler, model and caches, and turns requests into events."""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue

import torch

from adapters.adapter import Adapter
from service.blocks import BlockPool
from service.core import (
    Aborted,
    AdapterChoice,
    EngineObserver,
    EngineStats,
    Event,
    EventSink,
    Failed,
    Finished,
    FinishReason,
    GenerationRequest,
    Mode,
    ModelFacts,
    StepReport,
    Token,
    TokenEvent,
    Usage,
)
from service.errors import Draining, EngineFailed, InvalidRequest, QueueFull, UnknownAdapter
from service.kv_cache import KVCache
from service.lora import LoraBank, LoraStep
from service.merged import MergedCache, merge, merged_nbytes
from service.model import LoadedModel
from service.model_check import check_served_alike
from service.runner import Rows, Runner, pack
from service.sampling import Chosen
from service.scheduler import Batch, Scheduler, Sequence
from service.text import StopMatcher, TextStream

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EngineOptions:
    """Sizes and limits of an engine.

    Attributes:
        max_running: sequences that run side by side.
        max_waiting: requests that may queue behind them.
        max_batch_tokens: tokens of one step, decode rows and prefill chunks together.
        merge_after_steps: consecutive steps of one (adapter, rank) before its weights are merged.
    """

    max_running: int = 64
    max_waiting: int = 256
    max_batch_tokens: int = 512
    kv_cache_bytes: int = 512 << 20
    kv_block_tokens: int = 16
    merged_cache_bytes: int = 512 << 20
    merge_after_steps: int = 8


@dataclass(eq=False)
class _Ticket:
    """A request with all that the engine keeps for it."""

    sequence: Sequence
    sink: EventSink
    adapter: Adapter | None
    stream: TextStream
    submitted: float
    scheduled: float | None = None
    first_token: float | None = None
    has_columns: bool = False
    modes: set[Mode] = field(default_factory=set)

    @property
    def request(self) -> GenerationRequest:
        return self.sequence.request

    @property
    def mode(self) -> Mode:
        if self.adapter is None:
            return Mode.BASE
        return Mode.MERGED if self.modes == {Mode.MERGED} else Mode.MIXED


class Engine:
    """Continuous batching over one base model and any number of adapters. Implements `EngineProtocol`.

    All public methods may be called from any thread; everything below `_run` happens in the engine's own.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        options: EngineOptions | None = None,
        observer: EngineObserver | None = None,
    ) -> None:
        """Reserve the caches and check that the model can be served.

        Raises:
            ModelRefused: packed rows do not give the model's own answers, or the cache can't hold a single request.
        """
        options = options or EngineOptions()
        self._loaded = loaded
        self._options = options
        self._observer = observer
        dtype, device = loaded.model.dtype, loaded.model.device
        block_bytes = KVCache.token_bytes(loaded.layers, dtype) * options.kv_block_tokens
        most = options.max_running * -(-loaded.max_context_tokens // options.kv_block_tokens)
        self._pool = BlockPool(max(4, min(options.kv_cache_bytes // block_bytes, most)), options.kv_block_tokens)
        cache = KVCache(
            loaded.layers,
            total_blocks=self._pool.total,
            block_tokens=options.kv_block_tokens,
            dtype=dtype,
            device=device,
        )
        self._runner = Runner(loaded, cache)
        check_served_alike(loaded, self._runner, block_tokens=options.kv_block_tokens)
        self._scheduler = Scheduler(self._pool, max_running=options.max_running, max_batch_tokens=options.max_batch_tokens)
        self._bank = LoraBank(loaded.model, loaded.model.get_input_embeddings())
        self._merged = MergedCache(options.merged_cache_bytes)
        self._streak: tuple[AdapterChoice | None, int] = (None, 0)
        self._tickets: dict[Sequence, _Ticket] = {}

        self._facts = loaded.facts
        self._lock = threading.Condition()  # guards the four below
        self._adapters: dict[str, Adapter] = {}
        self._live: dict[str, Sequence] = {}  # request id -> sequence, from submit to its terminal event
        self._is_draining = False
        self._is_stopped = False
        self._inbox: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._stats = EngineStats(kv_blocks_total=self._pool.total)
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # -- any thread -------------------------------------------------------------------------------------------------

    @property
    def model(self) -> ModelFacts:
        """Facts of the base model."""
        return self._facts

    def start(self) -> None:
        """Start the engine's thread."""
        self._thread.start()

    def stop(self) -> None:
        """End at once: what runs is failed. Idempotent."""
        with self._lock:
            self._is_draining = self._is_stopped = True
        self._inbox.put(lambda: None)
        if self._thread.is_alive():
            self._thread.join()

    def drain(self, timeout_s: float) -> bool:
        """Refuse new requests and wait until what runs has ended; True if all ended in time."""
        with self._lock:
            self._is_draining = True
            return self._lock.wait_for(lambda: not self._live, timeout_s)

    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids of a prompt, as the model's own tokenizer gives them."""
        return tuple(self._loaded.tokenizer.encode(text))

    def load(self, version: str, adapter: Adapter) -> None:
        """Make an adapter servable. Idempotent per version.

        Raises:
            InvalidAdapter: it does not fit the base model; every offender is listed.
        """
        self._bank.check(adapter)
        with self._lock:
            self._adapters[version] = adapter

    def unload(self, version: str) -> None:
        """Forget an adapter. Requests in flight keep it until they end. Unknown versions are ignored."""
        with self._lock:
            self._adapters.pop(version, None)
        self._inbox.put(lambda: self._forget(version))

    def submit(self, request: GenerationRequest, sink: EventSink) -> None:
        """Queue a request. If this returns, exactly one terminal event will follow.

        Raises:
            QueueFull, Draining: the request was not taken.
            UnknownAdapter: its version is not loaded.
            InvalidRequest: it does not fit the model's context.
        """
        self._check(request)
        sequence = Sequence(request)
        stream = TextStream(self._loaded.tokenizer, request.prompt_ids)
        with self._lock:
            if self._is_draining:
                raise Draining
            if len(self._live) >= self._options.max_running + self._options.max_waiting:
                raise QueueFull(self._options.max_waiting)
            if request.request_id in self._live:
                raise InvalidRequest("request_id", f"{request.request_id!r} is in use by a request in flight")
            adapter = None
            if request.adapter is not None:
                adapter = self._adapters.get(request.adapter.version)
                if adapter is None:
                    raise UnknownAdapter(request.adapter.version)
                adapter.config.check_rank(request.adapter.rank)
            self._live[request.request_id] = sequence
            ticket = _Ticket(sequence, sink, adapter, stream, time.monotonic())
            self._inbox.put(lambda: self._accept(ticket))

    def abort(self, request_id: str) -> None:
        """End a request if it still runs; its place is free before the next step. Unknown ids are ignored."""
        with self._lock:
            sequence = self._live.get(request_id)
            if sequence is not None:
                self._inbox.put(lambda: self._abort(sequence))

    def stats(self) -> EngineStats:
        """Counts after the last step."""
        return self._stats

    def _check(self, request: GenerationRequest) -> None:
        asked = len(request.prompt_ids) + request.sampling.max_new_tokens
        limit = min(self._facts.max_context_tokens, self._pool.capacity_tokens)
        if not request.prompt_ids:
            raise InvalidRequest("inputs", "the prompt has no tokens; at least one is needed")
        if asked > limit:
            raise InvalidRequest(
                "max_new_tokens",
                f"{len(request.prompt_ids)} prompt tokens + {request.sampling.max_new_tokens} new tokens = {asked}"
                f" exceed the context of {limit} tokens",
            )

    # -- the engine's thread ----------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._is_stopped:
            self._obey()
            batch = self._scheduler.schedule()
            if batch is not None:
                self._step(batch)
            self._publish()
        self._obey()
        for ticket in list(self._tickets.values()):
            self._end(ticket, Failed(ticket.request.request_id, EngineFailed("the engine was stopped")))

    def _obey(self) -> None:
        """Carry out what other threads asked for; wait for the first if there is nothing else to do."""
        if not self._tickets and not self._is_stopped:
            self._inbox.get()()
        while True:
            try:
                command = self._inbox.get_nowait()
            except Empty:
                return
            command()

    def _accept(self, ticket: _Ticket) -> None:
        self._tickets[ticket.sequence] = ticket
        self._scheduler.add(ticket.sequence)

    def _abort(self, sequence: Sequence) -> None:
        ticket = self._tickets.get(sequence)
        if ticket is not None:  # else it ended while the call was on its way
            self._end(ticket, Aborted(ticket.request.request_id))

    def _step(self, batch: Batch) -> None:
        started = time.monotonic()
        tickets = [self._tickets[chunk.sequence] for chunk in batch.chunks]
        try:
            self._admit(tickets, started)
            rows = pack(batch, self._runner.device)
            mode, step = self._plan(batch, rows)
            chosen = self._runner.run(batch, rows, step)
        except Exception as error:  # whatever a model or a driver raises: its requests end, the others go on
            log.exception("a step of %d requests failed", len(tickets))
            for ticket in tickets:
                self._end(ticket, Failed(ticket.request.request_id, EngineFailed(f"the step failed: {error}")))
            return
        self._scheduler.commit(batch)
        now = time.monotonic()
        sampling = [ticket for ticket, chunk in zip(tickets, batch.chunks, strict=True) if chunk.samples]
        for ticket, choice in zip(sampling, chosen, strict=True):
            self._advance(ticket, choice, mode, now)
        if self._observer is not None:
            decodes = sum(chunk.start > 0 and chunk.length == 1 for chunk in batch.chunks)
            prefill_tokens = sum(chunk.length for chunk in batch.chunks) - decodes
            self._observer.on_step(StepReport(mode, prefill_tokens, decodes, now - started))

    def _admit(self, tickets: list[_Ticket], now: float) -> None:
        for ticket in tickets:
            if ticket.scheduled is None:
                ticket.scheduled = now
            choice = ticket.request.adapter
            if choice is not None and ticket.adapter is not None and not ticket.has_columns:
                self._bank.acquire(choice.version, ticket.adapter)
                ticket.has_columns = True

    def _plan(self, batch: Batch, rows: Rows) -> tuple[Mode, LoraStep | None]:
        """How this step runs: the base alone, one pair's merged weights, or everything mixed."""
        pairs = batch.pairs
        if pairs == {None}:
            return Mode.BASE, None
        choice = next(iter(pairs)) if len(pairs) == 1 else None
        self._streak = (choice, self._streak[1] + 1 if self._streak[0] == choice else 1)
        if choice is not None and (choice in self._merged or self._is_worth_merging(batch)):
            return Mode.MERGED, self._merged.get(choice) or self._merge(batch, choice)
        choices = [chunk.sequence.adapter for chunk in batch.chunks]
        return Mode.MIXED, self._bank.step(choices, [chunk.length for chunk in batch.chunks], rows.sampled)

    def _is_worth_merging(self, batch: Batch) -> bool:
        adapter = self._adapter_of(batch)
        return (
            self._streak[1] > self._options.merge_after_steps
            and merged_nbytes(adapter, self._bank.site) <= self._options.merged_cache_bytes
        )

    def _merge(self, batch: Batch, choice: AdapterChoice) -> LoraStep:
        started = time.monotonic()
        with torch.inference_mode():
            weights = merge(self._adapter_of(batch), choice, self._bank.site)
        self._merged.put(choice, weights)
        if self._observer is not None:
            self._observer.on_merge(time.monotonic() - started)
        return weights

    def _adapter_of(self, batch: Batch) -> Adapter:
        adapter = self._tickets[batch.chunks[0].sequence].adapter
        assert adapter is not None
        return adapter

    def _advance(self, ticket: _Ticket, chosen: Chosen, mode: Mode, now: float) -> None:
        """Take one sampled token: grow the text, tell the sink, and end the request if it is complete."""
        sampling = ticket.request.sampling
        ticket.sequence.tokens.append(chosen.token_id)
        ticket.modes.add(mode)
        if ticket.first_token is None:
            ticket.first_token = now
        piece = ticket.stream.push(chosen.token_id)
        reason = None
        end = StopMatcher(sampling.stop).end_of_match(ticket.stream.text, len(piece))
        if end is not None:
            reason = FinishReason.STOP_SEQUENCE
            piece = piece[: len(piece) - (len(ticket.stream.text) - end)]
        elif chosen.token_id in self._loaded.eos_ids and not sampling.ignore_eos:
            reason = FinishReason.EOS_TOKEN
        elif ticket.sequence.generated >= sampling.max_new_tokens:
            reason = FinishReason.LENGTH
        if reason is not None and end is None:
            piece += ticket.stream.flush()
        token = Token(chosen.token_id, piece, chosen.logprob, ticket.stream.is_special(chosen.token_id))
        request_id = ticket.request.request_id
        self._tell(ticket, TokenEvent(request_id, token, mode if ticket.adapter is not None else Mode.BASE))
        if reason is not None:
            self._end(ticket, Finished(request_id, reason, ticket.stream.text[:end], ticket.mode, self._usage(ticket)))

    def _usage(self, ticket: _Ticket) -> Usage:
        scheduled = ticket.scheduled or ticket.submitted
        first_token = ticket.first_token or scheduled
        return Usage(
            prompt_tokens=len(ticket.request.prompt_ids),
            generated_tokens=ticket.sequence.generated,
            queue_s=scheduled - ticket.submitted,
            time_to_first_token_s=first_token - ticket.submitted,
            total_s=time.monotonic() - ticket.submitted,
        )

    def _end(self, ticket: _Ticket, event: Finished | Aborted | Failed) -> None:
        """Free all that a request holds, then tell its sink. The only place where requests end."""
        del self._tickets[ticket.sequence]
        self._scheduler.finish(ticket.sequence)
        choice = ticket.request.adapter
        if choice is not None and ticket.has_columns:
            self._bank.release(choice.version)
            self._forget(choice.version)
        with self._lock:
            del self._live[ticket.request.request_id]
            self._lock.notify_all()
        self._publish()
        self._tell(ticket, event)

    def _forget(self, version: str) -> None:
        """Drop what is kept of an adapter, if it was unloaded and nobody uses it any more."""
        with self._lock:
            is_loaded = version in self._adapters
        if not is_loaded and not self._bank.is_used(version):
            self._bank.forget(version)
            self._merged.forget(version)

    def _tell(self, ticket: _Ticket, event: Event) -> None:
        try:
            ticket.sink(event)
        except Exception:  # a sink must not raise; one that does must not end the requests of others
            log.exception("the event sink of request %s raised", ticket.request.request_id)

    def _publish(self) -> None:
        self._stats = EngineStats(
            running=self._scheduler.running,
            waiting=self._scheduler.waiting,
            kv_blocks_used=self._pool.used,
            kv_blocks_total=self._pool.total,
            resident_adapters=self._bank.resident,
            adapter_bytes=self._bank.nbytes,
            merged=self._merged.stats,
        )

    def check_integrity(self) -> None:
        """Assert that an idle engine holds nothing: call it when no request is in flight."""
        self._scheduler.check_integrity()
        if self._tickets or self._live or self._pool.used or self._bank.users:
            raise AssertionError(
                f"an idle engine holds {len(self._tickets)} requests, {self._pool.used} blocks, {self._bank.users} users"
            )
