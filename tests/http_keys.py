"""API keys for tests: made, and written into a keys file."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from service.keys import Scope, digest_of, new_token


@dataclass(frozen=True)
class MadeKey:
    """A key, and what a request needs to show it."""

    name: str
    token: str
    entry: Mapping[str, Any]

    @property
    def headers(self) -> dict[str, str]:
        """The header that carries it."""
        return {"Authorization": f"Bearer {self.token}"}

    def http(self, url: str) -> httpx.Client:
        """Speaks to a server with it."""
        return httpx.Client(base_url=url, timeout=60, headers=self.headers)


def make_key(name: str, scopes: Sequence[Scope] = tuple(Scope), **limits: Any) -> MadeKey:
    """A key with its entry."""
    token, token_id = new_token()
    return MadeKey(name, token, {"tokens": {token_id: digest_of(token)}, "scopes": list(scopes), **limits})


def write_keys(path: Path, *keys: MadeKey) -> Path:
    """The keys file."""
    path.write_text(json.dumps({key.name: key.entry for key in keys}))
    return path
