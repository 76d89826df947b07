"""Which adapter and rank serve a request, and what is predicted of it."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

from service.core import SamplingParams
from service.errors import SloUnattainable
from service.http.adapters.served_adapter import ServedAdapter
from service.http.generation.measurement import Measurement
from service.http.generation.selection import Selection
from service.http.metrics import BASE_LABEL
from service.http.services import Services
from service.keys import ApiKey
from service.rank.ladder import constant
from service.rank.latency_policy import Prediction
from service.rank.load import InFlight
from service.rank.prospect import Ask
from service.rank.rank_policy import RankDecision, decide
from service.slo import Slo, Times


@dataclass(frozen=True)
class Choice:
    """What serves a request.

    Attributes:
        adapter, decision: None for the base model.
        slo: the objectives that it is measured by.
        predicted: its times at its rank; None while nothing can be predicted.
    """

    adapter: ServedAdapter | None
    decision: RankDecision | None
    slo: Slo
    predicted: Times | None = None

    @property
    def version(self) -> str | None:
        """Of the adapter."""
        return self.adapter.version if self.adapter else None

    @property
    def rank(self) -> int:
        """0 for the base model."""
        return self.decision.rank if self.decision else 0

    def measurement(self, services: Services, arrived_at: float) -> Measurement:
        """Follow the request from now on; `arrived_at` as `choose` has it."""
        return Measurement(
            services.auto_rank,
            services.metrics,
            slo=self.slo,
            decision=self.decision,
            predicted=self.predicted,
            arrived_at=arrived_at,
        )


def ask_of(prompt_tokens: int, sampling: SamplingParams) -> Ask:
    """The work of one sequence."""
    most = sampling.max_new_tokens
    can_end_early = not sampling.ignore_eos or sampling.stop or sampling.stop_token_ids
    return Ask(prompt_tokens, most, max(1, sampling.min_new_tokens) if can_end_early else most)


def _largest(asks: Sequence[Ask]) -> Ask:
    """One that takes as long as any of a request's sequences, of which there is at least one."""
    return Ask(
        max(each.prompt_tokens for each in asks),
        max(each.new_tokens for each in asks),
        max(each.least_tokens for each in asks),
    )


def choose(
    services: Services, selection: Selection, caller: ApiKey, asks: Sequence[Ask] = (), arrived_at: float = 0.0
) -> Choice:
    """Look the adapter up and decide on its rank.

    Args:
        asks: the work of each sequence; none while the prompt is not tokenised, when only names and rank can be checked.
        arrived_at: moment of `time.monotonic`.

    Raises:
        UnknownAdapter, AdapterUnfit, NotReady: as AdapterRegistry.resolve.
        IllegalRank, InvalidRequest: as rank_policy.decide.
        SloUnattainable: counted already.
    """
    try:
        return _choose(services, selection, caller, asks, arrived_at)
    except SloUnattainable as error:
        services.metrics.slo(error.policy, "refused")
        raise


def _choose(services: Services, selection: Selection, caller: ApiKey, asks: Sequence[Ask], arrived_at: float) -> Choice:
    adapter = None if selection.adapter is None else services.registry.resolve(selection.adapter, caller.name)

    def decided(prediction: Prediction | None) -> RankDecision | None:
        if adapter is None:
            return None
        policies = services.policies.with_default(caller.rank_policy or services.settings.adapter_policies.get(adapter.name))
        return decide(
            selection.rank, selection.policy, adapter.facts, policies, caller.bounds, slo=selection.slo, prediction=prediction
        )

    version = adapter.version if adapter else None
    prediction = None
    if asks:
        # The others' ranks follow from the same decision: as far as it does not depend on what is predicted.
        siblings = _siblings(version, decided(None), asks[1:]) if len(asks) > 1 else ()
        merged = services.engine.stats().merged_choices
        prediction = services.auto_rank.predict(version, _largest(asks), arrived_at, merged, siblings)
    decision = decided(prediction)
    if decision is not None:
        return Choice(adapter, decision, decision.slo, decision.predicted)
    if prediction is not None:
        prediction.check_possible(selection.slo, 0, BASE_LABEL)
    return Choice(None, None, selection.slo, prediction.at(0) if prediction else None)


def _siblings(version: str | None, decision: RankDecision | None, asks: Sequence[Ask]) -> list[InFlight]:
    """A request's other sequences, as they will be in the book."""
    ladder = decision.ladder if decision else constant(0)
    return [InFlight(version, ladder, ladder[0], each.prompt_tokens, each.new_tokens) for each in asks]


def monotonic_of(loop_time: float, loop_now: float) -> float:
    """A moment of the event loop's clock on that of `time.monotonic`, which the engine's thread reads."""
    return time.monotonic() - (loop_now - loop_time)
