"""Which adapter and rank a client names, in the body or in headers. Pure: nothing is looked up here."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from service.errors import InvalidRequest
from service.rank.rank_policy import RankWish
from service.slo import NO_SLO, Slo

ADAPTER_HEADER = "x-lora-adapter"
RANK_HEADER = "x-lora-rank"
POLICY_HEADER = "x-rank-policy"
SLO_HEADERS = ("x-latency-slo-ms", "x-ttft-slo-ms", "x-itl-slo-ms")
"""Of the fields of `Slo`, in their order."""

BASE_NAMES = ("", "base", "__base_model__")
"""What stands for no adapter, here and in LoRAX."""

_MILLISECONDS = re.compile(r"[0-9]{1,12}(\.[0-9]{1,12})?")


@dataclass(frozen=True)
class Selection:
    """What a request names; the policies fill what it leaves open.

    Attributes:
        adapter: its name, None for the base model.
        rank: the rank, or None where the request says nothing.
        policy: the name of a policy, or None.
        slo: latency objectives, perhaps none.
    """

    adapter: str | None
    rank: RankWish = None
    policy: str | None = None
    slo: Slo = NO_SLO


def select(
    adapter: str | None,
    rank: RankWish,
    policy: str | None,
    headers: Mapping[str, str],
    default_adapter: str | None = None,
    *,
    field: str = "adapter_id",
    slo: Slo = NO_SLO,
) -> Selection:
    """Join body and headers.

    The body comes first: if it names an adapter, the adapter header is not read; if it says anything of the rank
    (`rank`, `rank_policy`, `name@8`), neither rank header is; if it has any objective, no objective's header is.

    Args:
        headers: names in lower case.
        default_adapter: serves where neither names one; the base must then be asked for by name, as "base" or "".
        field: what the body calls the adapter.
        slo: the objectives that the body names.

    Raises:
        InvalidRequest: a rank without adapter, `name@8` beside another rank, a header that is not legal.
    """
    slo = slo.over(Slo(*(_milliseconds(headers, name) for name in SLO_HEADERS)))
    source = field
    if adapter is None and ADAPTER_HEADER in headers:
        adapter, source = headers[ADAPTER_HEADER], ADAPTER_HEADER
    if adapter is None:
        adapter = default_adapter
    name, at = _split(adapter or "", source)
    if at is not None and source == field:
        rank = _agree(at, rank, policy, source)
    elif rank is None and policy is None:
        rank, policy = _from_headers(headers)
        if at is not None:
            rank = _agree(at, rank, policy, source)
    if name in BASE_NAMES:
        if rank is not None or policy is not None:
            given = "rank" if rank is not None else "rank_policy"
            value = rank if rank is not None else policy
            raise InvalidRequest(given, f"{value!r:.80} without an adapter: the base has no rank; name an adapter in {field}")
        return Selection(None, slo=slo)
    return Selection(name, rank, policy, slo)


def parse_rank(text: str, field: str) -> RankWish:
    """A rank as a header or `name@rank` writes it."""
    if text == "max":
        return "max"
    if text == "auto":
        return "auto"
    if text.isascii() and text.isdigit() and len(text) <= 9 and int(text) >= 1:
        return int(text)
    raise InvalidRequest(field, f"{text[:80]!r} is no rank; legal: an integer of at least 1, 'max', 'auto'")


def _milliseconds(headers: Mapping[str, str], name: str) -> float | None:
    text = headers.get(name)
    if text is None:
        return None
    if not _MILLISECONDS.fullmatch(text) or float(text) <= 0:
        raise InvalidRequest(name, f"{text[:80]!r} is not legal: milliseconds, a number above 0")
    return float(text)


def _split(adapter: str, field: str) -> tuple[str, RankWish]:
    name, separator, rank = adapter.rpartition("@")
    return (name, parse_rank(rank, field)) if separator else (adapter, None)


def _from_headers(headers: Mapping[str, str]) -> tuple[RankWish, str | None]:
    text = headers.get(RANK_HEADER)
    return (None if text is None else parse_rank(text, RANK_HEADER)), headers.get(POLICY_HEADER)


def _agree(at: RankWish, rank: RankWish, policy: str | None, field: str) -> RankWish:
    if rank is not None and rank != at:
        raise InvalidRequest("rank", f"{rank!r} contradicts {field}, which ends in '@{at}'; give one of the two")
    if policy is not None and at != "auto":
        raise InvalidRequest("rank_policy", f"{policy[:80]!r} contradicts {field}, which ends in '@{at}'; give one")
    return at
