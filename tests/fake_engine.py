"""An engine without a model: it speaks EngineProtocol, and its words follow from prompt, adapter and rank alone.

The HTTP layer is tested with it: no weights, no torch, an answer in microseconds. A test steers it with
`paused`, `hold_loads`, `fail_next` and `refuse_adapters`, and waits on `wait_until` instead of sleeping.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from adapters.errors import InvalidAdapter
from service.core import (
    Aborted,
    AdapterChoice,
    Alternative,
    CacheStats,
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
    PromptToken,
    StepReport,
    Token,
    TokenEvent,
    Usage,
)
from service.engine.stops import AnswerText
from service.errors import Draining, EngineDown, EngineFailed, InvalidRequest, QueueFull, UnknownAdapter

if TYPE_CHECKING:
    from adapters.adapter import Adapter

EOS_ID = 256
WORDS = ("the", "river", "near", "a", "cheap", "pub", "serves", "good", "food", "for", "families", "and", "Café", "tea")


@dataclass
class _Running:
    request: GenerationRequest
    sink: EventSink
    submitted_at: float
    first_token_at: float | None = None
    tokens: int = 0
    modes: set[Mode] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.choice = self.request.adapter
        sampling = self.request.sampling
        self.answer = AnswerText(sampling.stop, include_stop=sampling.include_stop)


class FakeEngine:
    """Echoes deterministic words, one token per request and step, from a thread of its own.

    Args:
        observer: told of every step.
        max_context_tokens: prompt plus answer.
        max_running: requests that make tokens at the same time.
        max_waiting: requests queued beyond those.
        eos_after: the model "ends" after that many tokens; None for never.
    """

    def __init__(
        self,
        observer: EngineObserver | None = None,
        *,
        max_context_tokens: int = 512,
        max_running: int = 4,
        max_waiting: int = 8,
        eos_after: int | None = None,
    ) -> None:
        self.refuse_adapters: str | None = None
        """Set to a reason, it is what `load` refuses every adapter with."""
        self.has_chat_template = True
        self.is_alive = True
        """Set to False, it has failed."""
        self.submitted: list[GenerationRequest] = []
        """Every request taken, for tests that check what reached the engine."""
        self.loaded: dict[str, Adapter] = {}
        self._observer = observer
        self._max_running = max_running
        self._max_waiting = max_waiting
        self._eos_after = eos_after
        self._model = ModelFacts("fake", "fake", "float32", "cpu", 1000, 4000, EOS_ID + 1, max_context_tokens, longest_token=4)
        self._changed = threading.Condition()
        self._requests: dict[str, _Running] = {}
        self._aborting: set[str] = set()
        self._failures: list[str] = []
        self._is_paused = False
        self._is_draining = False
        self._is_stopped = False
        self._loads_allowed = threading.Event()
        self._loads_allowed.set()
        self._thread = threading.Thread(target=self._run, name="fake-engine", daemon=True)

    # What EngineProtocol asks for

    @property
    def model(self) -> ModelFacts:
        """Facts of a model that does not exist."""
        return self._model

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Fail what runs and end the thread. Idempotent."""
        with self._changed:
            self._is_stopped = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join()

    def drain(self, timeout_s: float) -> bool:
        """Refuse new requests and wait for those taken."""
        with self._changed:
            self._is_draining = True
            return self._changed.wait_for(lambda: not self._requests, timeout_s)

    def encode(self, text: str, *, with_special: bool = True) -> tuple[int, ...]:
        """One token per byte."""
        return tuple(text.encode())

    def adaptable_modules(self) -> Mapping[str, tuple[int, int]]:
        """None: there is no model."""
        return {}

    def chat_text(
        self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool, continue_final_message: bool
    ) -> str:
        """A line for each message, unless `has_chat_template` is false."""
        if not self.has_chat_template:
            raise InvalidRequest("messages", "this model has no chat template")
        text = "".join(f"{each['role']}: {each['content']}\n" for each in messages)
        if continue_final_message:
            return text.removesuffix("\n")
        return text + ("assistant:" if add_generation_prompt else "")

    def decode(self, ids: Sequence[int]) -> str:
        """The bytes as text."""
        return bytes(token for token in ids if token != EOS_ID).decode(errors="replace")

    def load(self, version: str, adapter: Adapter) -> None:
        """Remember the adapter, or refuse it as `refuse_adapters` says."""
        self._loads_allowed.wait()
        if self.refuse_adapters is not None:
            raise InvalidAdapter([self.refuse_adapters])
        with self._changed:
            self.loaded = {**self.loaded, version: adapter}

    def unload(self, version: str) -> None:
        """Forget the adapter; what runs is not touched."""
        with self._changed:
            self.loaded = {known: adapter for known, adapter in self.loaded.items() if known != version}

    def submit(self, request: GenerationRequest, sink: EventSink) -> None:
        """Queue a request, as EngineProtocol says."""
        self.submit_all([(request, sink)])

    def submit_all(self, asked: Sequence[tuple[GenerationRequest, EventSink]]) -> None:
        """Queue several, or none."""
        with self._changed:
            if not self.is_alive:
                raise EngineDown
            if self._is_draining or self._is_stopped:
                raise Draining
            for request, _ in asked:
                if request.adapter is not None and request.adapter.version not in self.loaded:
                    raise UnknownAdapter(request.adapter.version)
                if len(request.prompt_ids) + request.sampling.max_new_tokens > self._model.max_context_tokens:
                    raise InvalidRequest("max_new_tokens", "prompt and max_new_tokens exceed the context")
                request.sampling.check_token_ids(self._model.vocab_size)
            if len(self._requests) + len(asked) > self._max_running + self._max_waiting:
                raise QueueFull(self._max_waiting)
            for request, sink in asked:
                self.submitted.append(request)
                self._requests[request.request_id] = _Running(request, sink, time.perf_counter())
            self._changed.notify_all()

    def abort(self, request_id: str) -> None:
        """End a request at the next step, also while paused."""
        with self._changed:
            self._aborting.add(request_id)
            self._changed.notify_all()

    def change_rank(self, request_id: str, choice: AdapterChoice) -> None:
        """From the next token on, as EngineProtocol says."""
        with self._changed:
            if request_id in self._requests:
                self._requests[request_id].choice = choice

    def stats(self) -> EngineStats:
        """Counts at this moment; one block per request."""
        with self._changed:
            running = min(len(self._requests), self._max_running)
            return EngineStats(
                running=running,
                waiting=len(self._requests) - running,
                kv_blocks_used=running,
                kv_blocks_total=self._max_running,
                resident_adapters=len(self.loaded),
                adapter_bytes=sum(adapter.nbytes for adapter in self.loaded.values()),
                merged=CacheStats(hits=3, misses=2, evictions=1, nbytes=4096),
            )

    # What tests steer it with

    @contextmanager
    def paused(self) -> Iterator[None]:
        """No step is made inside the block; submits and aborts are."""
        self._set_paused(True)
        try:
            yield
        finally:
            self._set_paused(False)

    @contextmanager
    def hold_loads(self) -> Iterator[None]:
        """`load` blocks inside the block."""
        self._loads_allowed.clear()
        try:
            yield
        finally:
            self._loads_allowed.set()

    def fail_next(self, message: str) -> None:
        """Make the next step of one request raise."""
        with self._changed:
            self._failures.append(message)

    def wait_until(self, condition: Callable[[EngineStats], bool], timeout_s: float = 10.0) -> bool:
        """Block until the engine's counts satisfy the condition; False if they never did."""
        with self._changed:
            return self._changed.wait_for(lambda: condition(self.stats()), timeout_s)

    def _set_paused(self, is_paused: bool) -> None:
        with self._changed:
            self._is_paused = is_paused
            self._changed.notify_all()

    # The thread

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(self._has_work)
                events = self._abort_marked()
                if self._is_stopped:
                    events += [(r.sink, Failed(key, EngineFailed("stopped"))) for key, r in self._requests.items()]
                    self._requests.clear()
                elif not self._is_paused:
                    events += self._step()
                is_over = self._is_stopped
                # Told inside the lock: who waits for a count may rely on the events that led to it.
                for sink, event in events:
                    sink(event)
                self._changed.notify_all()
            if is_over:
                return

    def _has_work(self) -> bool:
        return self._is_stopped or bool(self._aborting) or (bool(self._requests) and not self._is_paused)

    def _abort_marked(self) -> list[tuple[EventSink, Event]]:
        ended = [self._requests.pop(key) for key in sorted(self._aborting) if key in self._requests]
        self._aborting.clear()
        return [(each.sink, Aborted(each.request.request_id)) for each in ended]

    def _step(self) -> list[tuple[EventSink, Event]]:
        active = list(self._requests.values())[: self._max_running]
        if not active:
            return []
        started_at = time.perf_counter()
        mode = _mode_of(active)
        events: list[tuple[EventSink, Event]] = []
        for each in active:
            events += [(each.sink, event) for event in self._advance(each, mode)]
        if self._observer is not None:
            self._observer.on_step(StepReport(mode, 0, len(active), time.perf_counter() - started_at))
        return events

    def _advance(self, each: _Running, mode: Mode) -> list[Event]:
        request = each.request
        key = request.request_id
        if self._failures:
            del self._requests[key]
            return [Failed(key, EngineFailed(self._failures.pop(0)))]
        mode = Mode.BASE if request.adapter is None else mode
        token = self._token(each, each.tokens)
        each.tokens += 1
        each.modes.add(mode)
        each.first_token_at = each.first_token_at or time.perf_counter()
        text, is_stopped = each.answer.push(token.text)
        reason = FinishReason.STOP_SEQUENCE if is_stopped else _finish_reason(each, token)
        if reason is not None and not is_stopped:
            text += each.answer.flush()
        rank = each.choice.rank if each.choice else 0
        events: list[Event] = [TokenEvent(key, replace(token, text=text), mode, is_last=reason is not None, rank=rank)]
        if reason is not None:
            del self._requests[key]
            final = next(iter(each.modes)) if len(each.modes) == 1 else Mode.MIXED
            events.append(Finished(key, reason, each.answer.text, final, _usage(each), _prompt(request)))
        return events

    def _token(self, running: _Running, index: int) -> Token:
        request, choice = running.request, running.choice
        if self._eos_after == index and not request.sampling.ignore_eos:
            return Token(EOS_ID, "", -0.5, special=True)
        alternatives = _alternatives(request.sampling.alternatives)
        seed = request.sampling.seed if request.sampling.do_sample else None
        key = (request.prompt_ids, choice and (choice.version, choice.rank), seed, index)
        digest = hashlib.sha256(repr(key).encode()).digest()
        return Token(digest[0], " " + WORDS[digest[1] % len(WORDS)], -digest[2] / 64, alternatives=alternatives)


def _mode_of(active: list[_Running]) -> Mode:
    choices = {each.choice for each in active}
    if choices == {None}:
        return Mode.BASE
    return Mode.MERGED if len(choices) == 1 else Mode.MIXED


def _finish_reason(each: _Running, token: Token) -> FinishReason | None:
    sampling = each.request.sampling
    if token.special:
        return FinishReason.EOS_TOKEN
    if token.id in sampling.stop_token_ids:
        return FinishReason.STOP_SEQUENCE
    if each.tokens >= sampling.max_new_tokens:
        return FinishReason.LENGTH
    return None


def _prompt(request: GenerationRequest) -> tuple[PromptToken, ...]:
    if not request.sampling.prompt_logprobs:
        return ()
    others = _alternatives(request.sampling.alternatives)
    first, *rest = request.prompt_ids
    following = (PromptToken(byte, chr(byte), -byte / 64, alternatives=others) for byte in rest)
    return (PromptToken(first, chr(first), None), *following)


def _alternatives(count: int) -> tuple[Alternative, ...]:
    return tuple(Alternative(i, f" {WORDS[i % len(WORDS)]}", -i / 4) for i in range(count))


def _usage(each: _Running) -> Usage:
    now = time.perf_counter()
    first = each.first_token_at or now
    return Usage(len(each.request.prompt_ids), each.tokens, 0.0, first - each.submitted_at, now - each.submitted_at)
