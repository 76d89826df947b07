"""Lets nobody in without a key, where the server has keys, and counts what each key has in use.

What is open is named here, path by path; everything else needs a key, also a path that leads nowhere. Which scope a route
needs is declared at the route (`needs` in routes_common.py), where the router's own matching decides: a second table of
paths could be led astray by a path that the two read differently.
"""

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from service.errors import KeyOverLimit, NoKey
from service.http.asgi.refusals import refuse_error
from service.http.tenants import Tenants
from service.keys import NOBODY, ApiKey

PROBE_PATHS = ("/health", "/ready")
OPEN_PATHS = (*PROBE_PATHS, "/", "/docs", "/docs/swagger-ui.css", "/docs/swagger-ui-bundle.js")
"""Answered to GET and HEAD without a key. The pages hold nothing of this server; they ask for a key and fetch the rest."""


class Authentication:
    """Puts the caller into the request's state, or answers 401; 429 where a key is over its limits."""

    def __init__(self, app: ASGIApp, tenants: Tenants) -> None:
        self._app = app
        self._tenants = tenants

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            caller = self._caller(scope)
            with self._tenants.admitted(caller) as admission:
                scope.setdefault("state", {}).update(caller=caller, admission=admission)
                await self._app(scope, receive, send)
        except (NoKey, KeyOverLimit) as error:
            await refuse_error(scope, error)(scope, receive, send)

    def _caller(self, scope: Scope) -> ApiKey:
        if not self._tenants.is_open and scope["method"] in ("GET", "HEAD") and scope["path"] in OPEN_PATHS:
            return NOBODY
        return self._tenants.identify(Headers(scope=scope).get("authorization"))
