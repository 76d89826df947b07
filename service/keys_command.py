"""`dylora keys new`: make an API key, show it once, and what to put into the keys file."""

import json
import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from adapters.commands.command import Command, option
from adapters.errors import AdapterError
from service.keys import NAME_PATTERN, KeyEntry, Scope, digest_of, new_token


class KeysAction(StrEnum):
    """What to do with keys."""

    NEW = "new"


def _scopes(text: str) -> tuple[Scope, ...]:
    try:
        return tuple(Scope(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"{text!r} is not legal: one or more of {', '.join(Scope)}, separated by commas") from None


def _name(text: str) -> str:
    if not re.fullmatch(NAME_PATTERN, text):
        raise ValueError(f"{text!r} is not legal: a letter or digit, then up to 63 letters, digits, '.', '_' or '-'")
    return text


def _positive(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) >= 1):
        raise ValueError(f"{text!r} is not legal: an integer of at least 1")
    return int(text)


@dataclass(frozen=True)
class KeysOptions:
    """Options of `dylora keys`."""

    action: KeysAction = option("what to do: 'new' makes a key", positional=True)
    name: str = option("who the key is for: logs say it, and private adapters belong to it", parse=_name)
    scopes: tuple[Scope, ...] = option(
        f"what it may do, separated by commas: {', '.join(Scope)} (default: generate,adapters:read)", (), parse=_scopes
    )
    default_adapter: str | None = option("adapter of requests that name none", None)
    rank_policy: str | None = option("policy that chooses the rank where a request leaves it open", None)
    rank_floor: int | None = option("smallest rank it may use", None, parse=_positive)
    rank_ceiling: int | None = option("largest rank it may use", None, parse=_positive)
    max_in_flight: int | None = option("most requests at the same time, each sequence counting as one", None, parse=_positive)
    requests_per_minute: int | None = option("most requests per minute", None, parse=_positive)
    private_uploads: bool = option("adapters that it uploads are seen by this key alone", False)

    def __post_init__(self) -> None:
        if self.rank_ceiling is not None and self.rank_ceiling < (self.rank_floor or 1):
            raise AdapterError(f"--rank-ceiling {self.rank_ceiling} is below --rank-floor {self.rank_floor}")


def keys(options: KeysOptions) -> int:
    """Print a new key and its entry. The key itself is kept nowhere."""
    token, token_id = new_token()
    given: dict[str, Any] = {
        name: value for name, value in vars(options).items() if name not in ("action", "name") and value not in (None, False)
    }
    scopes = list(options.scopes or (Scope.GENERATE, Scope.ADAPTERS_READ))
    entry = KeyEntry(tokens={token_id: digest_of(token)}, **{**given, "scopes": scopes})
    shown = entry.model_dump(mode="json", exclude_defaults=True)
    print(f"The key, shown this once:\n\n  {token}\n")
    print("Its entry for the file of --api-keys-file; SIGHUP makes a running server read it:\n")
    print(json.dumps({options.name: shown}, indent=2))
    return 0


COMMAND = Command(
    name="keys",
    summary="make an API key",
    description="""\
Make an API key: 256 random bits, of which the server keeps only a SHA-256.

  dylora keys new --name alice --scopes generate,adapters:read --requests-per-minute 60

The file is a JSON object of such entries by name. To replace a key, give its entry two tokens for a while.""",
    options=KeysOptions,
    run=keys,
)
