"""What tests of the engine share: a character tokenizer, random nested adapters, and a client that waits for its events."""

import random
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from adapters.adapter import Adapter, LowRank
from adapters.config import AdapterConfig, AdapterKind
from service.core import (
    Aborted,
    AdapterChoice,
    EngineObserver,
    Event,
    Failed,
    Finished,
    GenerationRequest,
    SamplingParams,
    StepReport,
    TokenEvent,
)
from service.engine.backend import Backend
from service.engine.engine import Engine
from service.engine.model import prepare_model
from service.engine.options import EngineOptions
from service.engine.sites import Site, site_kind
from tests.tiny_models import LINEAR_TARGETS, VOCAB


def character_tokenizer() -> PreTrainedTokenizerFast:
    """One token a printable ASCII character: 96 in all, the last ends a generation."""
    vocabulary = {chr(32 + i): i for i in range(VOCAB - 1)} | {"<eos>": VOCAB - 1}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


def random_dylora(kind: str, model: PreTrainedModel, *, seed: int, r_max: int = 8, alpha: float = 4.0) -> Adapter:
    """A DyLoRA of noise over every linear layer of a tiny model's blocks."""
    generator = torch.Generator().manual_seed(seed)
    modules = {}
    for path, module in model.named_modules():
        if any(path.endswith(f".{target}") for target in LINEAR_TARGETS[kind]):
            site = Site(path, module, site_kind(module))
            a = 0.2 * torch.randn(r_max, site.in_features, generator=generator)
            b = 0.2 * torch.randn(site.out_features, r_max, generator=generator)
            modules[path] = LowRank(a, b)
    return Adapter(AdapterConfig(AdapterKind.DYLORA, r_max, alpha), modules)


@dataclass
class Client:
    """Collects one request's events. `result` waits for the terminal one."""

    events: list[Event] = field(default_factory=list)
    _ended: threading.Event = field(default_factory=threading.Event)
    _token: threading.Event = field(default_factory=threading.Event)

    def __call__(self, event: Event) -> None:
        assert not self._ended.is_set(), f"an event after the terminal one: {event}"
        self.events.append(event)
        self._token.set()
        if not isinstance(event, TokenEvent):
            self._ended.set()

    def wait_for_first_token(self) -> None:
        assert self._token.wait(60)

    @property
    def end(self) -> Finished | Aborted | Failed:
        """The terminal event."""
        assert self._ended.wait(60), "the request did not end within a minute"
        last = self.events[-1]
        assert not isinstance(last, TokenEvent)
        return last

    @property
    def finished(self) -> Finished:
        """The terminal event of a request that must succeed."""
        end = self.end
        assert isinstance(end, Finished), end
        return end

    @property
    def tokens(self) -> list[int]:
        """Ids of all generated tokens, once the request has succeeded."""
        assert self.finished
        return [event.token.id for event in self.events if isinstance(event, TokenEvent)]


class Reports:
    """An observer that keeps what it is told, and lets a test wait for merges, which are made in the background."""

    def __init__(self) -> None:
        self.steps: list[StepReport] = []
        self.merges = 0
        self._changed = threading.Condition()

    def on_step(self, report: StepReport) -> None:
        self.steps.append(report)

    def on_merge(self, seconds: float) -> None:
        with self._changed:
            self.merges += 1
            self._changed.notify_all()

    def wait_for_merges(self, count: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: self.merges >= count, 60), f"{self.merges} of {count} merges were made"


@contextmanager
def running_engine(
    model: PreTrainedModel,
    adapters: Mapping[str, Adapter] | None = None,
    options: EngineOptions | None = None,
    observer: EngineObserver | None = None,
    backend: Backend | None = None,
) -> Iterator[Engine]:
    """An engine that is started, and that must hold nothing when the block ends."""
    engine = Engine(prepare_model(model, character_tokenizer(), name="tiny"), options, observer, backend)
    for version, adapter in (adapters or {}).items():
        engine.load(version, adapter)
    engine.start()
    try:
        yield engine
        assert engine.drain(60)
    finally:
        engine.stop()
    engine.check_integrity()


def generate(engine: Engine, requests: Sequence[GenerationRequest]) -> list[Client]:
    """Submit all requests at once and wait until every one has succeeded."""
    clients = [Client() for _ in requests]
    for request, client in zip(requests, clients, strict=True):
        engine.submit(request, client)
    for client in clients:
        assert client.finished
    return clients


def generate_merged(engine: Engine, reports: Reports, requests: Sequence[GenerationRequest]) -> list[Client]:
    """Run each request alone after its pair was merged. The engine merges after the first step, and reports to `reports`."""
    for request in {request.adapter: request for request in requests if request.adapter is not None}.values():
        before = reports.merges
        generate(engine, [request])
        reports.wait_for_merges(before + 1)
    return [generate(engine, [request])[0] for request in requests]


def mixed_requests(
    adapters: Mapping[str, Adapter],
    *,
    count: int = 32,
    ranks: Sequence[int] = (1, 2, 4, 8),
    new_tokens: int = 16,
    ignore_eos: bool = True,
) -> list[GenerationRequest]:
    """Requests over every adapter at every rank and the base alone, with prompts of 1 to 29 tokens."""
    rng = random.Random(0)
    pairs: list[AdapterChoice | None] = [
        AdapterChoice(version, rank, adapter.config.scale(rank)) for version, adapter in adapters.items() for rank in ranks
    ]
    choices = [None if i % 5 == 4 else pairs[(3 * i) % len(pairs)] for i in range(count)]
    return [
        GenerationRequest(
            f"request-{i}",
            tuple(rng.randrange(VOCAB - 1) for _ in range(rng.randrange(1, 30))),
            SamplingParams(max_new_tokens=new_tokens, ignore_eos=ignore_eos),
            choice,
        )
        for i, choice in enumerate(choices)
    ]
