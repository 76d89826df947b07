"""From logits to tokens, for all rows of a step at once."""

from collections.abc import Callable
from collections.abc import Sequence as Rows
from dataclasses import dataclass

import torch
from torch import Tensor

from service.core import SamplingParams
from service.engine.filters import draw, highest_ids, keep_min_p, keep_top_k, keep_top_p, keep_typical
from service.engine.native.kernels import Kernels
from service.engine.random_numbers import as_int64, uniform_numbers
from service.engine.scheduler import Sequence
from service.engine.token_counts import TokenCounts


@dataclass(frozen=True)
class Chosen:
    """A chosen token.

    Attributes:
        logprob: under the model, before penalties, bias, temperature and filters.
        alternatives: the most probable tokens with theirs, most probable first.
    """

    token_id: int
    logprob: float
    alternatives: tuple[tuple[int, float], ...] = ()


class Sampler:
    """Chooses the next tokens of a step's rows.

    What follows from the parameters alone is laid out once, and kept while the same sequences run. Rows that are greedy and
    ask for nothing else cost one argmax, whatever their neighbours do.

    Args:
        eos_ids: tokens that end a generation, unless it ignores them.
        kernels: for logits on the CPU.
    """

    def __init__(self, eos_ids: frozenset[int] = frozenset(), kernels: Kernels | None = None) -> None:
        self._eos_ids = eos_ids
        self._kernels = kernels
        self._sequences: tuple[Sequence, ...] = ()
        self._plan = _Plan()
        self._counts = TokenCounts()

    def choose(self, logits: Tensor, sequences: Rows[Sequence]) -> list[Chosen]:
        """Choose each row's next token. Greedy rows take the maximum, the lowest id among equals.

        Args:
            logits: [rows, vocabulary].
            sequences: one per row, with all tokens before the one to choose.
        """
        logits = logits.float()
        plan = self._plan_for(tuple(sequences), logits.device)
        ids, normaliser = self._highest(logits)
        if plan.shaped is not None:
            ids[plan.shaped] = self._choose_shaped(logits[plan.shaped], plan)
        logprobs = logits.gather(1, ids[:, None]).squeeze(1) - normaliser
        chosen = [Chosen(token, logprob) for token, logprob in zip(ids.tolist(), logprobs.tolist(), strict=True)]
        return _with_alternatives(chosen, logits, normaliser, plan) if plan.alternatives else chosen

    def _highest(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Each row's most probable token and the logarithm of what its probabilities are divided by; [rows] and [rows]."""
        if self._kernels is not None and logits.is_contiguous():
            return self._kernels.argmax(logits)  # 0.3 of the time: one pass for the maximum, one for the sum
        return logits.argmax(-1), logits.logsumexp(-1)

    def _plan_for(self, sequences: tuple[Sequence, ...], device: torch.device) -> "_Plan":
        if self._sequences != sequences:
            self._sequences = sequences
            self._plan = _Plan.of(sequences, self._eos_ids, device)
            if self._plan.counted is None:
                self._counts = TokenCounts()  # frees what the last penalties needed
        return self._plan

    def _choose_shaped(self, scores: Tensor, plan: "_Plan") -> Tensor:
        """One id a row, of the rows that are not plainly greedy. Overwrites `scores`, [shaped, vocabulary]."""
        self._penalise(scores, plan)
        if plan.bias is not None:
            scores.index_put_((plan.bias.rows, plan.bias.ids), plan.bias.values, accumulate=True)
        generated = torch.tensor([each.generated for each in plan.sequences], device=scores.device)  # [shaped]
        if plan.endings is not None:
            is_early = generated[plan.endings.rows] < plan.endings.values
            barred = torch.where(is_early, -torch.inf, 0.0)
            scores.index_put_((plan.endings.rows, plan.endings.ids), barred, accumulate=True)
        ids = scores.argmax(-1)
        if plan.sampled is not None:
            uniform = uniform_numbers(plan.seeds, generated[plan.sampled])[:, None]
            ids[plan.sampled] = draw(_filtered(scores[plan.sampled], plan), uniform)
        return ids

    def _penalise(self, scores: Tensor, plan: "_Plan") -> None:
        """The penalties, in place."""
        if plan.counted is None:
            return
        counts = self._counts
        counts.update(plan.counted_sequences, scores.shape[-1], scores.device)
        rows, ids = counts.is_known.nonzero(as_tuple=True)  # [occurring], few beside the vocabulary
        values = scores[plan.counted[rows], ids]
        repetition = plan.repetition[rows]
        values = torch.where(values < 0, values * repetition, values / repetition)
        times = counts.in_answer[rows, ids]
        values -= plan.frequency[rows] * times + plan.presence[rows] * (times > 0)
        scores[plan.counted[rows], ids] = values


@dataclass(frozen=True)
class _Column:
    """One parameter of the rows that use it."""

    rows: Tensor  # [n], int64
    values: Tensor  # [n, 1]


@dataclass(frozen=True)
class _Entries:
    """Single entries of the scores."""

    rows: Tensor  # [n], int64
    ids: Tensor  # [n], int64
    values: Tensor  # [n]


_NONE = torch.empty(0)


@dataclass(frozen=True)
class _Plan:
    """The parameters of a step's rows as tensors. None stands for what no row uses.

    `counted`, `bias`, `endings` and `sampled` number the shaped rows; temperature and filters the sampled ones.
    """

    shaped: Tensor | None = None  # [shaped], rows that are not plainly greedy
    sequences: tuple[Sequence, ...] = ()  # of the shaped rows
    counted: Tensor | None = None  # [counted], rows with penalties
    counted_sequences: tuple[Sequence, ...] = ()
    repetition: Tensor = _NONE  # [counted]
    presence: Tensor = _NONE  # [counted]
    frequency: Tensor = _NONE  # [counted]
    bias: _Entries | None = None
    endings: _Entries | None = None  # tokens that must not be chosen before `values` tokens are generated
    sampled: Tensor | None = None  # [sampled]
    seeds: Tensor = _NONE  # [sampled], int64
    temperature: _Column | None = None
    filters: tuple[tuple[Callable[[Tensor, Tensor], Tensor], _Column], ...] = ()  # in the order they act
    alternatives: tuple[tuple[int, int], ...] = ()  # (row, how many) of the rows that ask for some

    @classmethod
    def of(cls, sequences: Rows[Sequence], eos_ids: frozenset[int], device: torch.device) -> "_Plan":
        """Lay out the parameters of a step's rows."""
        params = [each.request.sampling for each in sequences]
        alternatives = tuple((row, each.alternatives) for row, each in enumerate(params) if each.alternatives)
        shaped = [row for row, each in enumerate(params) if _is_shaped(each)]
        if not shaped:
            return cls(alternatives=alternatives)
        params = [params[row] for row in shaped]
        kept = tuple(sequences[row] for row in shaped)
        counted = [row for row, each in enumerate(params) if _is_counted(each)]
        sampled = [row for row, each in enumerate(params) if each.do_sample]
        drawn = [params[row] for row in sampled]

        def penalty(read: Callable[[SamplingParams], float]) -> Tensor:
            return torch.tensor([read(params[row]) for row in counted], device=device)

        def column(read: Callable[[SamplingParams], float | None], neutral: float | None) -> _Column | None:
            used = [(row, value) for row, each in enumerate(drawn) if (value := read(each)) != neutral]
            if not used:
                return None
            rows, values = zip(*used, strict=True)
            return _Column(torch.tensor(rows, device=device), torch.tensor(values, device=device)[:, None])

        filters = (
            (keep_top_k, column(lambda each: each.top_k, None)),
            (keep_top_p, column(lambda each: each.top_p, 1.0)),
            (keep_min_p, column(lambda each: each.min_p, 0.0)),
            (keep_typical, column(lambda each: each.typical_p, 1.0)),
        )
        return cls(
            shaped=torch.tensor(shaped, device=device),
            sequences=kept,
            counted=torch.tensor(counted, device=device) if counted else None,
            counted_sequences=tuple(kept[row] for row in counted),
            repetition=penalty(lambda each: each.repetition_penalty),
            presence=penalty(lambda each: each.presence_penalty),
            frequency=penalty(lambda each: each.frequency_penalty),
            bias=_entries([each.logit_bias for each in params], device),
            endings=_entries([_barred(each, eos_ids) for each in params], device),
            sampled=torch.tensor(sampled, device=device) if sampled else None,
            seeds=torch.tensor([as_int64(each.seed) for each in drawn], dtype=torch.long, device=device),
            temperature=column(lambda each: each.temperature, 1.0),
            filters=tuple((keep, used) for keep, used in filters if used is not None),
            alternatives=alternatives,
        )


def _is_counted(params: SamplingParams) -> bool:
    return params.repetition_penalty != 1.0 or params.presence_penalty != 0.0 or params.frequency_penalty != 0.0


def _is_shaped(params: SamplingParams) -> bool:
    """Whether a row's token may be another than its most probable one."""
    return params.do_sample or bool(params.logit_bias) or params.min_new_tokens > 0 or _is_counted(params)


def _barred(params: SamplingParams, eos_ids: frozenset[int]) -> list[tuple[int, float]]:
    """The tokens that end a generation, with the number of tokens before which they must not be chosen."""
    if not params.min_new_tokens:
        return []
    ending = {*params.stop_token_ids, *(() if params.ignore_eos else eos_ids)}
    return [(token, float(params.min_new_tokens)) for token in sorted(ending)]


def _entries(by_row: Rows[Rows[tuple[int, float]]], device: torch.device) -> _Entries | None:
    flat = [(row, token, value) for row, each in enumerate(by_row) for token, value in each]
    if not flat:
        return None
    rows, ids, values = zip(*flat, strict=True)
    return _Entries(torch.tensor(rows, device=device), torch.tensor(ids, device=device), torch.tensor(values, device=device))


def _filtered(scores: Tensor, plan: _Plan) -> Tensor:
    """The sampled rows' scores after temperature and filters, [sampled, vocabulary]. Overwrites `scores`."""
    if plan.temperature is not None:
        scores[plan.temperature.rows] /= plan.temperature.values
    for keep, used in plan.filters:
        scores[used.rows] = keep(scores[used.rows], used.values)
    return scores


def _with_alternatives(chosen: list[Chosen], logits: Tensor, normaliser: Tensor, plan: _Plan) -> list[Chosen]:
    """Add the most probable tokens of the rows that ask for them."""
    asking, counts = zip(*plan.alternatives, strict=True)
    found = most_probable(logits[list(asking)], normaliser[list(asking)], counts)
    for row, pairs in zip(asking, found, strict=True):
        chosen[row] = Chosen(chosen[row].token_id, chosen[row].logprob, pairs)
    return chosen


def most_probable(logits: Tensor, normaliser: Tensor, counts: Rows[int]) -> list[tuple[tuple[int, float], ...]]:
    """The most probable tokens of each row with their log-probabilities, most probable first.

    Args:
        logits: [rows, vocabulary], float32.
        normaliser: logsumexp of each row, [rows].
        counts: how many each row asks for; the vocabulary may have fewer.
    """
    if not any(counts):
        return [()] * len(counts)
    ids = highest_ids(logits, max(counts))  # [rows, most]
    logprobs = logits.gather(1, ids) - normaliser[:, None]
    rows = zip(counts, ids.tolist(), logprobs.tolist(), strict=True)
    return [tuple(zip(tokens[:count], numbers[:count], strict=True)) for count, tokens, numbers in rows]
