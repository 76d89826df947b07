"""Measuring an adapter's quality at each rank on texts that a client sends, in the background, through the engine itself.

One text runs at a time, and only while no request of a client waits: what it costs the others is one row of their steps.
"""

import asyncio
import secrets
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from enum import StrEnum

from anyio import to_thread

from adapters.errors import AdapterBusy, AdapterError
from adapters.quality import Metric, QualityProfile
from service.core import AdapterChoice, EngineProtocol, Failed, Finished, GenerationRequest, SamplingParams
from service.errors import EngineFailed, QueueFull, ServiceError, TooManyJobs, UnknownJob
from service.http.adapters.registry import AdapterRegistry
from service.http.generation.stream import EventStream
from service.keys import ApiKey
from service.log import logger

METRIC = "loss per token"
"""Mean negative log-likelihood, in nats, of the tokens of the completions; lower is better."""
MAX_UNFINISHED = 8
_MAX_KEPT = 100
_PAUSE_S = 0.05


class JobState(StrEnum):
    """How a calibration stands."""

    WAITING = "waiting"
    """Others are measured first."""
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


@dataclass(frozen=True)
class MeasuredText:
    """Token ids of a text, of which those from `scored_from` on are measured; the first token of all never is."""

    ids: tuple[int, ...]
    scored_from: int


@dataclass
class Job:
    """One calibration. Only touched from the event loop.

    Attributes:
        version: of the adapter that is measured; if another one comes, the job fails.
        source: what the profile will say that it was measured on.
        caller: the API key that asked.
        done: texts measured so far, over all ranks and the base.
        problem: why it failed.
        is_being_kept: the result is on its way to the store, and it is too late to cancel.
        losses: rank to the mean loss, of the ranks that are complete; 0 is the base.
    """

    id: str
    adapter: str
    version: str
    ranks: tuple[int, ...]
    texts: int
    source: str
    caller: ApiKey
    state: JobState = JobState.WAITING
    done: int = 0
    problem: str | None = None
    is_being_kept: bool = False
    losses: dict[int, float] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Texts to measure, over all ranks and the base."""
        return self.texts * (len(self.ranks) + 1)

    @property
    def is_over(self) -> bool:
        """Nothing more will happen."""
        return self.state not in (JobState.WAITING, JobState.RUNNING)

    @property
    def profile(self) -> QualityProfile:
        """The result of a job whose ranks are all measured."""
        values = {rank: self.losses[rank] for rank in self.ranks}
        metric = Metric(METRIC, higher_is_better=False, values=values, base=self.losses[0])
        return QualityProfile((metric,), self.source, examples=self.texts)


class Calibrations:
    """All calibrations of a server. They run one after another; the finished ones are remembered for a while."""

    def __init__(self, engine: EngineProtocol, registry: AdapterRegistry) -> None:
        self._engine = engine
        self._registry = registry
        self._jobs: dict[str, Job] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._turn = asyncio.Lock()

    def start(self, name: str, ranks: Sequence[int], texts: Sequence[MeasuredText], source: str, caller: ApiKey) -> Job:
        """Begin to measure an adapter.

        Raises:
            UnknownAdapter, AdapterUnfit: there is nothing to measure.
            NameTaken: the adapter is shared, and the caller may change its own only.
            AdapterBusy: the adapter is being measured already.
            TooManyJobs: too many wait.
        """
        served = self._registry.resolve(name, caller.name)
        self._registry.check_may_change(name, caller)
        unfinished = [job for job in self._jobs.values() if not job.is_over]
        if any(job.adapter == name for job in unfinished):
            raise AdapterBusy(name)
        if len(unfinished) >= MAX_UNFINISHED:
            raise TooManyJobs(MAX_UNFINISHED)
        job = Job(secrets.token_hex(8), name, served.version, tuple(ranks), len(texts), source, caller)
        self._forget_old()
        self._jobs[job.id] = job
        task = asyncio.create_task(self._run(job, tuple(texts)))
        self._tasks[job.id] = task
        task.add_done_callback(lambda _: self._tasks.pop(job.id, None))
        return job

    def get(self, name: str, job_id: str) -> Job:
        """A job of an adapter. Raises UnknownJob."""
        job = self._jobs.get(job_id)
        if job is None or job.adapter != name:
            raise UnknownJob(job_id)
        return job

    async def cancel(self, job: Job) -> None:
        """End one, unless it is over. One whose result is being kept already ends as done."""
        await self._end([job])

    async def cancel_all_of(self, name: str) -> None:
        """End what still measures an adapter."""
        await self._end([job for job in self._jobs.values() if job.adapter == name])

    async def stop(self) -> None:
        """End everything."""
        await self._end(list(self._jobs.values()))

    async def _end(self, jobs: Sequence[Job]) -> None:
        found = [(job, self._tasks[job.id]) for job in jobs if job.id in self._tasks]
        for job, task in found:
            # The thread that writes to the store would go on without it, and no longer hold the adapter's name.
            if not job.is_being_kept:
                task.cancel()
        if found:
            await asyncio.wait([task for _, task in found])
        for job in jobs:
            if not job.is_over:
                job.state = JobState.CANCELLED

    def _forget_old(self) -> None:
        over = [job.id for job in self._jobs.values() if job.is_over]
        for job_id in over[: max(0, len(self._jobs) + 1 - _MAX_KEPT)]:
            del self._jobs[job_id]

    async def _run(self, job: Job, texts: Sequence[MeasuredText]) -> None:
        try:
            async with self._turn:
                job.state = JobState.RUNNING
                for rank in (0, *job.ranks):
                    job.losses[rank] = await self._mean_loss(job, rank, texts)
                await self._keep(job)
            job.state = JobState.DONE
        except (ServiceError, AdapterError) as error:
            job.state, job.problem = JobState.FAILED, str(error)
        except Exception:
            logger.exception("a calibration failed")
            job.state, job.problem = JobState.FAILED, "internal error; the server's log has it"

    async def _mean_loss(self, job: Job, rank: int, texts: Sequence[MeasuredText]) -> float:
        choice = self._choice(job, rank) if rank else None
        nats, tokens = 0.0, 0
        for text in texts:
            logprobs = await self._logprobs(text, choice)
            nats, tokens = nats - sum(logprobs), tokens + len(logprobs)
            job.done += 1
        return nats / tokens

    def _choice(self, job: Job, rank: int) -> AdapterChoice:
        served = self._registry.resolve(job.adapter, job.caller.name)
        if served.version != job.version:
            raise EngineFailed("the adapter was replaced meanwhile")
        return served.choice(rank)

    async def _logprobs(self, text: MeasuredText, choice: AdapterChoice | None) -> list[float]:
        """Of the measured tokens of one text."""
        sampling = SamplingParams(max_new_tokens=1, prompt_logprobs=True)
        while True:
            while self._engine.stats().waiting:
                await asyncio.sleep(_PAUSE_S)
            events = EventStream(self._engine, GenerationRequest(secrets.token_hex(8), text.ids, sampling, choice))
            with suppress(QueueFull):
                events.submit()
                break
            await asyncio.sleep(_PAUSE_S)
        with closing(events):
            async for event in events:
                if isinstance(event, Failed):
                    raise event.error
                if isinstance(event, Finished):
                    return list(_measured(event, text))
        raise EngineFailed("the measurement was aborted")

    async def _keep(self, job: Job) -> None:
        """Make the result the adapter's quality profile, unless the adapter was replaced."""
        with self._registry.writing(job.adapter, job.caller):
            job.is_being_kept = True
            self._choice(job, job.ranks[0])
            await to_thread.run_sync(self._registry.set_quality, job.adapter, job.version, job.profile)


def _measured(end: Finished, text: MeasuredText) -> Iterator[float]:
    return (token.logprob for token in end.prompt[text.scored_from :] if token.logprob is not None)
