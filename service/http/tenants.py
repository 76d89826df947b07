"""Who calls, and how much of the server they have in use: the keys in force, and an account for each."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from service.errors import InvalidRequest, KeyOverLimit, NoKey, WrongScope
from service.http.limits import Clock, TokenBucket, whole_seconds
from service.keys import ANYONE, ApiKey, KeyRing, KeysError, Scope, parse_keys, read_keys
from service.log import entry, logger
from service.rank.policies import PolicyBook
from service.settings import Settings, SettingsError, variable

_NEWEST_WEIGHT = 0.2


@dataclass
class _Account:
    """What one key has in use. Only touched from the event loop."""

    in_flight: int = 0
    mean_s: float = 1.0
    """Moving average of how long the key's requests take."""
    bucket: TokenBucket | None = None

    def bucket_for(self, per_minute: int, clock: Clock) -> TokenBucket:
        if self.bucket is None or self.bucket.per_minute != per_minute:
            self.bucket = TokenBucket(per_minute, clock)
        return self.bucket


class Admission:
    """One request of a key, and as how many it counts. Only touched from the event loop."""

    def __init__(self, key: ApiKey, account: _Account | None = None) -> None:
        self.key = key
        self.counted = 1
        self._account = account

    def count(self, sequences: int, field: str) -> None:
        """Count each of its sequences as a request in flight, until the whole request ends.

        Args:
            field: what asks for so many.

        Raises:
            InvalidRequest: the key may never have so many.
            KeyOverLimit: they do not fit beside those that it has.
        """
        limit, account = self.key.max_in_flight, self._account
        if account is None:
            return
        if limit is not None and sequences > limit:
            message = f"{sequences} sequences are more than this API key may have in flight; legal: up to {limit}"
            raise InvalidRequest(field, message)
        others = account.in_flight - self.counted
        if limit is not None and others + sequences > limit:
            wait_s = account.mean_s * (others + sequences - limit) / others
            what = f"{limit} requests in flight, where each of {sequences} sequences counts"
            raise KeyOverLimit(what, whole_seconds(wait_s))
        account.in_flight = others + sequences
        self.counted = sequences


class Tenants:
    """The keys in force. Without any, the server is open and every caller is ANYONE.

    Args:
        read: reads the keys anew; None for a server without keys. Raises KeysError.
        clock: of the limits per key.

    Raises:
        KeysError: the keys can't be read.
    """

    def __init__(self, read: Callable[[], KeyRing] | None = None, clock: Clock = time.monotonic) -> None:
        self._read = read
        self._ring = None if read is None else read()
        self._clock = clock
        self._accounts: dict[str, _Account] = {}

    @classmethod
    def of(cls, settings: Settings) -> "Tenants":
        """The tenants that the settings name.

        Raises:
            SettingsError: their keys can't be read, or name a policy that there is not.
        """
        book, path, text = settings.policy_book(), settings.api_keys_file, settings.api_keys
        try:
            if path is not None:
                return cls(lambda: _checked(read_keys(path), book))
            return cls() if text is None else cls(lambda: _checked(parse_keys(text.get_secret_value()), book))
        except KeysError as error:
            field = "api_keys" if path is None else "api_keys_file"
            lines = str(error).splitlines()
            raise SettingsError("\n".join(f"{field} ({variable(field)}): {line}" for line in lines)) from None

    @property
    def is_open(self) -> bool:
        """No key is asked for."""
        return self._ring is None

    def reload(self) -> None:
        """Read the keys again. If that fails the old ones stay in force, and the log says why.

        Requests in flight end under the key they began with.
        """
        if self._read is None:
            logger.warning("no API keys are configured: there is nothing to read again")
            return
        try:
            self._ring = self._read()
        except KeysError as error:
            logger.error(entry("API keys not read again, the old ones stay", problem=error))
            return
        logger.info(entry("API keys read again", keys=len(list(self._ring))))

    def identify(self, authorization: str | None) -> ApiKey:
        """The caller by its Authorization header.

        Raises:
            NoKey: there is none, or it is not valid.
        """
        if self._ring is None:
            return ANYONE
        if authorization is None:
            raise NoKey(was_given=False)
        scheme, _, token = authorization.partition(" ")
        key = self._ring.find(token.strip()) if scheme.lower() == "bearer" else None
        if key is None:
            raise NoKey(was_given=True)
        return key

    @contextmanager
    def admitted(self, key: ApiKey) -> Iterator[Admission]:
        """Count one request of a key while the block runs.

        Raises:
            KeyOverLimit: it has too many in flight, or had too many in the last minute.
        """
        if not key.name:
            yield Admission(key)
            return
        account = self._accounts.setdefault(key.name, _Account())
        if key.max_in_flight is not None and account.in_flight >= key.max_in_flight:
            # With n in flight, each of them `mean_s` long, one ends every mean_s / n seconds.
            raise KeyOverLimit(f"{key.max_in_flight} requests in flight", whole_seconds(account.mean_s / account.in_flight))
        if key.requests_per_minute is not None:
            wait_s = account.bucket_for(key.requests_per_minute, self._clock).take()
            if wait_s:
                raise KeyOverLimit(f"{key.requests_per_minute} requests per minute", whole_seconds(wait_s))
        started_at = self._clock()
        admission = Admission(key, account)
        account.in_flight += 1
        try:
            yield admission
        finally:
            account.in_flight -= admission.counted
            account.mean_s += _NEWEST_WEIGHT * (self._clock() - started_at - account.mean_s)


def check_scope(key: ApiKey, needed: Scope) -> None:
    """Raise WrongScope unless the key has a scope."""
    if needed not in key.scopes:
        raise WrongScope(needed.value)


def _checked(ring: KeyRing, book: PolicyBook) -> KeyRing:
    for key in ring:
        try:
            book.with_default(key.rank_policy)
        except ValueError as error:
            raise KeysError(f"{key.name}.rank_policy: {error}") from None
    return ring
