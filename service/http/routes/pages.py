"""The pages for people: the playground, and the OpenAPI document in Swagger UI. Neither loads anything from elsewhere."""

import base64
import hashlib
import re
from collections.abc import Mapping
from functools import cache
from importlib import resources

import fastapi_offline
from fastapi import APIRouter
from fastapi.responses import HTMLResponse, Response

router = APIRouter()

_SWAGGER = resources.files(fastapi_offline).joinpath("static")
_PLAYGROUND = {"connect-src": "'self'", "img-src": "data:"}
_DOCS = {**_PLAYGROUND, "script-src": "'self'", "style-src": "'self'"}
_FILE_HEADERS = {"Cache-Control": "public, max-age=3600", "X-Content-Type-Options": "nosniff"}


@router.get("/", tags=["operations"], response_class=HTMLResponse)
async def playground() -> HTMLResponse:
    """A page to try ranks on."""
    return _page("index.html", _PLAYGROUND)


@router.get("/docs", include_in_schema=False)
async def docs() -> HTMLResponse:
    """The OpenAPI document, to read and to try. Where the server has keys, the page asks for one and fetches it."""
    return _page("docs.html", _DOCS)


@router.get("/docs/swagger-ui.css", include_in_schema=False)
async def swagger_style() -> Response:
    """Swagger UI's style sheet."""
    return Response(_swagger_file("swagger-ui.css"), media_type="text/css", headers=_FILE_HEADERS)


@router.get("/docs/swagger-ui-bundle.js", include_in_schema=False)
async def swagger_script() -> Response:
    """Swagger UI."""
    return Response(_swagger_file("swagger-ui-bundle.js"), media_type="text/javascript", headers=_FILE_HEADERS)


@cache
def _swagger_file(name: str) -> bytes:
    return _SWAGGER.joinpath(name).read_bytes()


@cache
def _html(name: str) -> str:
    return resources.files("service.http").joinpath("web", name).read_text(encoding="utf-8")


def _page(name: str, sources: Mapping[str, str]) -> HTMLResponse:
    """A page with a policy that lets run its own script and style, and whatever else `sources` allow, and nothing more."""
    html = _html(name)
    allowed = {"script-src": "", "style-src": "", **sources}
    for tag in ("script", "style"):
        match = re.search(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        digest = hashlib.sha256((match[1] if match else "").encode()).digest()
        allowed[f"{tag}-src"] += f" 'sha256-{base64.b64encode(digest).decode()}'"
    lines = [f"{directive} {source.strip()}" for directive, source in allowed.items()]
    locked = ["base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'"]
    policy = "; ".join(["default-src 'none'", *lines, *locked])
    return HTMLResponse(
        html,
        headers={"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"},
    )
