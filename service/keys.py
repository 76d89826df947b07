"""API keys: what one is, how it is made and checked, and the file that names them. No HTTP here.

A key is `dyl_<id>_<secret>`: the id is public and finds the entry, the secret is 256 random bits. At rest there is only the
SHA-256 of the whole. No slow hash (bcrypt, Argon2): those make guessing dear where people choose passwords, and 256 random
bits can't be guessed at any speed; checking them would only be work that anybody could impose on the server. So that this
argument holds, nothing but a key of that form and length is ever accepted, whatever hash the file has.
"""

import hashlib
import hmac
import json
import re
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from service.rank.policies import RankBounds

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
"""What a key may be called: a key's name appears in logs and owns private adapters."""

_KEY = re.compile(r"dyl_([0-9a-f]{12})_[A-Za-z0-9_-]{43}")
_SECRET_BYTES = 32
_ID_BYTES = 6
_MAX_FILE_BYTES = 4 << 20
_NO_DIGEST = "0" * 64


class Scope(StrEnum):
    """What a key may be used for."""

    GENERATE = "generate"
    ADAPTERS_READ = "adapters:read"
    ADAPTERS_WRITE = "adapters:write"
    METRICS = "metrics"


class KeysError(Exception):
    """Keys that can't be read; one line per offender. It never repeats a value, which may be a key in the wrong place."""


@dataclass(frozen=True)
class ApiKey:
    """One caller and what the server grants it.

    Attributes:
        name: of the entry; "" for a caller without key.
        scopes: what it may do.
        default_adapter: serves requests that name none.
        rank_policy: chooses the rank where the request leaves it open; None for the server's default.
        bounds: the ranks it may use.
        max_in_flight: requests at the same time, each sequence of a generation counting as one; None for no limit.
        requests_per_minute: None for no limit.
        private_uploads: adapters that it uploads are its own: no other key sees them.
    """

    name: str
    scopes: frozenset[Scope]
    default_adapter: str | None = None
    rank_policy: str | None = None
    bounds: RankBounds = field(default_factory=RankBounds)
    max_in_flight: int | None = None
    requests_per_minute: int | None = None
    private_uploads: bool = False


ANYONE = ApiKey("", frozenset(Scope))
"""Every caller of a server without keys."""
NOBODY = ApiKey("", frozenset())
"""A caller without key, where the server has keys."""


class KeyRing:
    """All keys of a server, by the ids of their tokens."""

    def __init__(self, entries: Mapping[str, tuple[ApiKey, str]]) -> None:
        """`entries`: token id to the key and the SHA-256 of the token, in hex."""
        self._entries = dict(entries)

    def __repr__(self) -> str:
        return f"KeyRing({', '.join(sorted(key.name for key in self))})"

    def __iter__(self) -> Iterator[ApiKey]:
        """Every key once."""
        return iter({key.name: key for key, _ in self._entries.values()}.values())

    def find(self, token: str) -> ApiKey | None:
        """The key that a client presents, None if it is not one of ours.

        The id is public, so looking it up tells nothing. The digests are compared in constant time, and an unknown id costs
        what a known one does.
        """
        match = _KEY.fullmatch(token)
        if match is None:
            return None
        key, digest = self._entries.get(match[1], (None, _NO_DIGEST))
        return key if hmac.compare_digest(digest, digest_of(token)) else None


def digest_of(token: str) -> str:
    """SHA-256 in hex, which is all that is kept of a key."""
    return hashlib.sha256(token.encode()).hexdigest()


def new_token() -> tuple[str, str]:
    """A new key and its id."""
    token_id = secrets.token_hex(_ID_BYTES)
    return f"dyl_{token_id}_{secrets.token_urlsafe(_SECRET_BYTES)}", token_id


class KeyEntry(BaseModel):
    """One entry of the keys file, under the key's name."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    tokens: dict[Annotated[str, Field(pattern="^[0-9a-f]{12}$")], Annotated[str, Field(pattern="^[0-9a-f]{64}$")]] = Field(
        min_length=1, description="id to SHA-256 of each token; two while one replaces the other"
    )
    scopes: list[Scope] = Field(min_length=1)
    default_adapter: str | None = Field(None, min_length=1)
    rank_policy: str | None = None
    rank_floor: int = Field(1, ge=1)
    rank_ceiling: int | None = Field(None, ge=1)
    max_in_flight: int | None = Field(None, ge=1)
    requests_per_minute: int | None = Field(None, ge=1)
    private_uploads: bool = False

    @model_validator(mode="after")
    def _bounds_agree(self) -> "KeyEntry":
        if self.rank_ceiling is not None and self.rank_ceiling < self.rank_floor:
            raise ValueError(f"rank_ceiling must be at least rank_floor, {self.rank_floor}")
        return self

    def key(self, name: str) -> ApiKey:
        """The entry as the server uses it."""
        return ApiKey(
            name=name,
            scopes=frozenset(self.scopes),
            default_adapter=self.default_adapter,
            rank_policy=self.rank_policy,
            bounds=RankBounds(self.rank_floor, self.rank_ceiling),
            max_in_flight=self.max_in_flight,
            requests_per_minute=self.requests_per_minute,
            private_uploads=self.private_uploads,
        )


_ENTRIES = TypeAdapter(dict[Annotated[str, Field(pattern=NAME_PATTERN)], KeyEntry])


def read_keys(path: Path) -> KeyRing:
    """Read a keys file.

    Raises:
        KeysError: it can't be read, or an entry is not legal; each is named, and no value is repeated.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(_MAX_FILE_BYTES + 1)
    except OSError as error:
        raise KeysError(f"{path}: {error.strerror}") from None
    if len(raw) > _MAX_FILE_BYTES:
        raise KeysError(f"{path}: larger than {_MAX_FILE_BYTES} bytes")
    try:
        return parse_keys(raw)
    except KeysError as error:
        raise KeysError("\n".join(f"{path}: {line}" for line in str(error).splitlines())) from None


def parse_keys(text: str | bytes) -> KeyRing:
    """Read keys as the file has them.

    Raises:
        KeysError: as `read_keys`.
    """
    try:
        content = json.loads(text, object_pairs_hook=_without_repeats)
    except KeysError:
        raise
    except (ValueError, RecursionError):
        raise KeysError("not JSON") from None
    try:
        entries = _ENTRIES.validate_python(content)
    except ValidationError as error:
        raise KeysError("\n".join(_findings(error))) from None
    if not entries:
        # Never taken for a server without keys: emptying the file must not open the door.
        raise KeysError("no keys; a server without keys has no keys file at all")
    found: dict[str, tuple[ApiKey, str]] = {}
    for name, entry in entries.items():
        for token_id, digest in entry.tokens.items():
            if token_id in found:
                raise KeysError(f"{name}.tokens: the id {token_id} is in use by {found[token_id][0].name}")
            found[token_id] = (entry.key(name), digest)
    return KeyRing(found)


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = sorted({name for name in names if names.count(name) > 1})
        raise KeysError(f"appears more than once in one object: {', '.join(repeated)[:200]}")
    return content


def _findings(error: ValidationError) -> Iterator[str]:
    for item in error.errors(include_url=False, include_context=False, include_input=False):
        where = [str(part) for part in item["loc"]]
        if "tokens" in where[1:2]:
            # What stands there instead of an id and a digest may be the key itself.
            yield f"{where[0]}.tokens: must be 12 hex digits (a key's id) to 64 (its SHA-256), as `dylora keys new` prints it"
        else:
            yield f"{'.'.join(where) or 'the whole'}: {item['msg'].removeprefix('Value error, ')}"
