"""The engine: one thread owns scheduler, model and caches, and turns requests into events."""

import logging
import threading
import time
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Several
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from queue import Empty, SimpleQueue

from adapters.adapter import Adapter
from service.core import (
    Aborted,
    AdapterChoice,
    EngineObserver,
    EngineStats,
    Event,
    EventSink,
    Failed,
    Finished,
    GenerationRequest,
    ModelFacts,
)
from service.engine.backend import Backend
from service.engine.backend_choice import backend_for
from service.engine.model import LoadedModel
from service.engine.observers import EngineObservers
from service.engine.options import EngineOptions
from service.engine.planner import Planner
from service.engine.prompts import Prompts
from service.engine.readiness import make_ready
from service.engine.runner import pack
from service.engine.scheduler import Batch, Scheduler, Sequence
from service.engine.ticket import Ticket
from service.engine.vocabulary import Vocabulary, longest_token
from service.errors import Draining, EngineDown, EngineFailed, InvalidRequest, QueueFull, UnknownAdapter

log = logging.getLogger(__name__)


class Engine:
    """Continuous batching over one base model and any number of adapters. Implements `EngineProtocol`.

    All public methods may be called from any thread; everything below `_run` happens in the engine's own.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        options: EngineOptions | None = None,
        observer: EngineObserver | None = None,
        backend: Backend | None = None,
    ) -> None:
        """Reserve the caches and check that the model can be served.

        Args:
            backend: the fastest for the model's device and format unless given.

        Raises:
            ModelRefused: packed rows do not give the model's own answers, or the cache can't hold a single request.
        """
        options = options or EngineOptions()
        self._loaded = loaded
        self._options = options
        observer = None if observer is None else EngineObservers(observer)  # whose errors are not ours
        self._observer = observer
        ready = make_ready(loaded, options, backend or backend_for(loaded, options.compile))
        self._pool, self._runner, self._bank = ready.pool, ready.runner, ready.bank
        self._vocabulary = Vocabulary(loaded.tokenizer)
        self._prompts = Prompts(loaded.tokenizer)
        self._inbox: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._scheduler = Scheduler(
            self._pool,
            max_running=options.max_running,
            max_batch_tokens=options.max_batch_tokens,
            prefill_chunk_tokens=options.prefill_chunk_tokens,
            prefix_cache=options.prefix_cache,
        )
        self._planner = Planner(
            self._bank,
            cache_bytes=options.merged_cache_bytes,
            merge_after_steps=options.merge_after_steps,
            observer=observer,
            post=self._inbox.put,
        )
        self._tickets: dict[Sequence, Ticket] = {}
        self._step_ended: float | None = None  # the last one; None where there was nothing to do since

        # One limit for all who ask: what the model allows, and what the cache can hold of one request.
        context = min(loaded.max_context_tokens, self._pool.capacity_tokens)
        self._facts = replace(ready.facts, max_context_tokens=context, longest_token=longest_token(loaded.tokenizer))
        self._token_ids = range(len(loaded.model.get_input_embeddings().weight))
        self._lock = threading.Condition()  # guards the six below
        self._adapters: dict[str, Adapter] = {}
        self._live: dict[str, Ticket] = {}  # by request id, from submit to the terminal event
        self._ending = 0  # requests that left `_live` and whose sink has not heard it yet
        self._is_draining = False
        self._is_stopped = False
        self._has_failed = False
        self._stats = EngineStats(kv_blocks_total=self._pool.total)
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # -- any thread -------------------------------------------------------------------------------------------------

    @property
    def model(self) -> ModelFacts:
        """Facts of the base model."""
        return self._facts

    @property
    def is_alive(self) -> bool:
        """False once the engine's own thread has failed."""
        return not self._has_failed

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
        self._planner.stop()

    def drain(self, timeout_s: float) -> bool:
        """Refuse new requests and wait until what runs has ended; True if all ended in time."""
        with self._lock:
            self._is_draining = True
            return self._lock.wait_for(lambda: not self._live and not self._ending, timeout_s)

    def encode(self, text: str, *, with_special: bool = True) -> tuple[int, ...]:
        """Token ids of a prompt, as the model's own tokenizer gives them."""
        return self._prompts.encode(text, with_special=with_special)

    def chat_text(
        self, messages: Several[Mapping[str, str]], *, add_generation_prompt: bool, continue_final_message: bool
    ) -> str:
        """The prompt of a conversation, by the tokenizer's chat template.

        Raises:
            InvalidRequest: there is no chat template, or it refuses the conversation.
        """
        return self._prompts.chat_text(
            messages, add_generation_prompt=add_generation_prompt, continue_final_message=continue_final_message
        )

    def decode(self, ids: Several[int]) -> str:
        """The text of some tokens, without the special ones."""
        return self._prompts.decode(ids)

    def adaptable_modules(self) -> Mapping[str, tuple[int, int]]:
        """Paths of the linear modules inside the model's blocks, which adapters usually adapt, with their (in, out)."""
        return self._bank.linear_modules()

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
            QueueFull, Draining, EngineDown: the request was not taken.
            UnknownAdapter: its version is not loaded.
            InvalidRequest: it does not fit the model's context, or names a token that the model does not have.
        """
        self.submit_all([(request, sink)])

    def submit_all(self, asked: Several[tuple[GenerationRequest, EventSink]]) -> None:
        """Queue several requests, or none of them. Raises as `submit` does."""
        for request, _ in asked:
            self._check(request)
        with self._lock:
            if self._has_failed:
                raise EngineDown
            if self._is_draining:
                raise Draining
            if len(self._live) + len(asked) > self._options.max_running + self._options.max_waiting:
                raise QueueFull(self._options.max_waiting)
            taken: dict[str, Ticket] = {}
            for request, sink in asked:
                if request.request_id in self._live or request.request_id in taken:
                    raise InvalidRequest("request_id", f"{request.request_id!r} is in use by a request in flight")
                taken[request.request_id] = self._ticket(request, sink)
            self._live |= taken
            for ticket in taken.values():
                self._inbox.put(partial(self._accept, ticket))

    def _ticket(self, request: GenerationRequest, sink: EventSink) -> Ticket:
        """Of a request that may be taken. Call with the lock."""
        adapter = None
        if request.adapter is not None:
            adapter = self._adapters.get(request.adapter.version)
            if adapter is None:
                raise UnknownAdapter(request.adapter.version)
            adapter.config.check_rank(request.adapter.rank)
        eos_ids = frozenset() if request.sampling.ignore_eos else self._loaded.eos_ids
        return Ticket(Sequence(request), sink, adapter, self._vocabulary, eos_ids, time.monotonic())

    def abort(self, request_id: str) -> None:
        """End a request if it still runs; its place is free before the next step. Unknown ids are ignored."""
        with self._lock:
            ticket = self._live.get(request_id)
            if ticket is not None:
                self._inbox.put(lambda: self._abort(ticket))

    def change_rank(self, request_id: str, choice: AdapterChoice) -> None:
        """Let a request go on at another rank of its adapter from the next step on. Unknown ids are ignored.

        The keys and values that it has stay, so what it computes from then on depends on both ranks, and is shared with
        nobody. A request that waits, or is computed again after a preemption, runs as if it had had the new rank from the
        beginning.

        Raises:
            ValueError: the choice is of another adapter.
            IllegalRank: the adapter does not have the rank.
        """
        with self._lock:
            ticket = self._live.get(request_id)
            if ticket is None:
                return
            sequence = ticket.sequence
            if ticket.adapter is None or choice.version != sequence.version:
                raise ValueError(f"{request_id!r} runs {sequence.version}, not {choice.version}")
            ticket.adapter.config.check_rank(choice.rank)  # the ticket's own: it may have been unloaded meanwhile
            self._inbox.put(lambda: sequence.change_rank(choice))

    def stats(self) -> EngineStats:
        """Counts after the last step."""
        return self._stats

    def check_integrity(self) -> None:
        """Assert that every block, row and adapter's user belongs to a live request; an idle engine thus holds nothing.

        An engine that runs checks itself between two steps.

        Raises:
            AssertionError: naming what does not add up.
        """
        checked: Future[None] = Future()
        with self._lock:
            is_running = self._thread.is_alive() and not self._is_stopped
            if is_running:
                self._inbox.put(lambda: _answer(checked, self._check_integrity))
        if is_running:
            return checked.result()
        if self._thread.is_alive():
            self._thread.join()
        self._check_integrity()

    def _check(self, request: GenerationRequest) -> None:
        asked = len(request.prompt_ids) + request.sampling.max_new_tokens
        limit = self._facts.max_context_tokens
        if not request.prompt_ids:
            raise InvalidRequest("prompt_ids", "the prompt has no tokens; at least one is needed")
        if min(request.prompt_ids) < 0 or max(request.prompt_ids) not in self._token_ids:  # a tokenizer may know more tokens
            unknown = next(token for token in request.prompt_ids if token not in self._token_ids)
            message = f"the model has no token {unknown}, which the prompt contains; legal: 0 to {self._token_ids[-1]}"
            raise InvalidRequest("prompt_ids", message)
        if asked > limit:
            raise InvalidRequest(
                "max_new_tokens",
                f"{len(request.prompt_ids)} prompt tokens + {request.sampling.max_new_tokens} new tokens = {asked}"
                f" exceed the context of {limit} tokens",
            )
        request.sampling.check_token_ids(self._facts.vocab_size)

    # -- the engine's thread ----------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._is_stopped:
                self._obey()
                self._step()
        except Exception:  # a bug of ours: whoever waits must still hear of an end
            log.exception("the engine's thread failed and takes no more requests")
            self._has_failed = True
        with self._lock:
            self._is_draining = self._is_stopped = True
        self._obey()
        error = EngineDown() if self._has_failed else EngineFailed("the engine was stopped")
        for ticket in list(self._tickets.values()):
            self._end(ticket, Failed(ticket.request.request_id, error))

    def _step(self) -> None:
        batch = self._scheduler.schedule()
        if batch is not None:
            self._execute(batch)
        self._publish()

    def _obey(self) -> None:
        """Carry out what other threads asked for; wait for the first if there is nothing else to do."""
        if not self._tickets and not self._is_stopped:
            self._inbox.get()()
            self._step_ended = None
        while True:
            try:
                command = self._inbox.get_nowait()
            except Empty:
                return
            command()

    def _accept(self, ticket: Ticket) -> None:
        self._tickets[ticket.sequence] = ticket
        self._scheduler.add(ticket.sequence)

    def _abort(self, ticket: Ticket) -> None:
        if ticket.sequence in self._tickets:  # else it ended while the call was on its way
            self._end(ticket, Aborted(ticket.request.request_id))

    def _execute(self, batch: Batch) -> None:
        started = time.monotonic()
        pause_s = 0.0 if self._step_ended is None else started - self._step_ended
        self._step_ended = None
        batch = Batch(tuple(chunk for chunk in batch.chunks if self._admit(self._tickets[chunk.sequence], started)))
        if not batch.chunks:
            return
        tickets = [self._tickets[chunk.sequence] for chunk in batch.chunks]
        try:
            rows = pack(batch, self._runner.device)
            mode, step = self._planner.plan(batch, tickets[0].adapter, rows)
            chosen = self._runner.run(batch, rows, step)
        except Exception as error:  # whatever a model or a driver raises: its requests end, the others go on
            log.exception("a step of %d requests failed", len(tickets))
            for ticket in tickets:
                self._end(ticket, Failed(ticket.request.request_id, EngineFailed(f"the step failed: {error}")))
            return
        self._scheduler.commit(batch)
        self._publish()  # before anyone hears of a token, who may look at the counts at once
        now = self._step_ended = time.monotonic()
        self._planner.record(mode, rows.input_ids.numel(), now - started)
        sampling = [ticket for ticket, chunk in zip(tickets, batch.chunks, strict=True) if chunk.samples]
        for ticket, choice in zip(sampling, chosen, strict=True):
            for event in ticket.take(choice, mode, now):
                if isinstance(event, Finished):
                    self._end(ticket, event)
                else:
                    self._tell(ticket, event)
        if self._observer is not None:
            self._observer.on_step(batch.report(mode, now - started, pause_s))

    def _admit(self, ticket: Ticket, now: float) -> bool:
        """Give a request's adapter its columns. If there is no memory for them the request ends, and the step's others run."""
        if ticket.scheduled is None:
            ticket.scheduled = now
        choice = ticket.request.adapter
        if choice is None or ticket.adapter is None or ticket.has_columns:
            return True
        try:
            self._bank.acquire(choice.version, ticket.adapter)
        except Exception as error:  # whatever a driver raises
            log.exception("an adapter of rank %d found no room", ticket.adapter.config.r_max)
            reason = f"no room for its adapter of rank {ticket.adapter.config.r_max} beside those in use: {error}"
            self._end(ticket, Failed(ticket.request.request_id, EngineFailed(reason)))
            return False
        ticket.has_columns = True
        return True

    def _end(self, ticket: Ticket, event: Finished | Aborted | Failed) -> None:
        """Free all that a request holds, then tell its sink. The only place where requests end."""
        del self._tickets[ticket.sequence]
        self._scheduler.finish(ticket.sequence)
        choice = ticket.request.adapter
        if choice is not None and ticket.has_columns:
            self._bank.release(choice.version)
            self._forget(choice.version)
        with self._lock:
            del self._live[ticket.request.request_id]  # before the client hears of it, who may reuse the id at once
            self._ending += 1
        self._publish()
        self._tell(ticket, event)
        with self._lock:
            self._ending -= 1
            self._lock.notify_all()

    def _forget(self, version: str) -> None:
        """Drop what is kept of an adapter, if it was unloaded and nobody uses it any more."""
        with self._lock:
            is_loaded = version in self._adapters
        if not is_loaded and not self._bank.is_used(version):
            self._bank.forget(version)
            self._planner.forget(version)
            self._pool.forget(version)

    def _tell(self, ticket: Ticket, event: Event) -> None:
        try:
            ticket.sink(event)
        except Exception:  # a sink must not raise; one that does must not end the requests of others
            log.exception("the event sink of request %s raised", ticket.request.request_id)

    def _publish(self) -> None:
        self._stats = EngineStats(
            running=self._scheduler.running,
            waiting=self._scheduler.waiting,
            kv_blocks_used=self._pool.used,
            kv_blocks_cached=self._pool.cached,
            kv_blocks_total=self._pool.total,
            resident_adapters=self._bank.resident,
            adapter_bytes=self._bank.nbytes,
            merged=self._planner.stats,
            merged_choices=self._planner.merged_choices,
            prefix=self._scheduler.prefix_stats,
        )

    def _check_integrity(self) -> None:
        self._scheduler.check_integrity()
        if {*self._scheduler.sequences()} != self._tickets.keys():
            raise AssertionError(f"{len(self._tickets)} tickets for {len(self._scheduler.sequences())} sequences")
        with self._lock:
            live = {ticket.sequence for ticket in self._live.values()}
        if not self._tickets.keys() <= live:
            raise AssertionError("a request that has ended still has a row")
        users = sum(ticket.has_columns for ticket in self._tickets.values())
        if users != self._bank.users:
            raise AssertionError(f"the adapters have {self._bank.users} users, {users} of them requests")


def _answer(asked: Future[None], call: Callable[[], None]) -> None:
    """Do what another thread waits for, and let an error be that thread's."""
    try:
        call()
    except AssertionError as error:
        asked.set_exception(error)
    else:
        asked.set_result(None)
