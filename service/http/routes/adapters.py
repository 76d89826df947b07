"""The adapters: list, upload, replace, delete, export."""

from contextlib import ExitStack
from typing import Annotated, Any

from anyio import to_thread
from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import FileResponse
from starlette import types

from service.errors import InvalidRequest
from service.http.adapters import changes
from service.http.adapters.schemas import AdapterOut, entry_of
from service.http.adapters.uploads import receive_upload
from service.http.routes.common import ONLY_KNOWN_QUERIES, AdapterName, TheCaller, TheServices, errors, needs
from service.keys import Scope

router = APIRouter(
    prefix="/adapters", tags=["adapters"], dependencies=[ONLY_KNOWN_QUERIES], responses=errors(401, 403, 422, 429)
)
_READ = [needs(Scope.ADAPTERS_READ)]
_WRITE = [needs(Scope.ADAPTERS_WRITE)]

_UPLOAD_BODY: dict[str, Any] = {
    "required": True,
    "content": {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "properties": {
                    "adapter_config.json": {"type": "string", "format": "binary"},
                    "adapter_model.safetensors": {"type": "string", "format": "binary"},
                    "quality.json": {"type": "string", "format": "binary"},
                    "archive": {"type": "string", "format": "binary", "description": "a zip, instead of the files"},
                    "renest": {"type": "boolean", "default": True},
                },
            }
        },
        "application/zip": {"schema": {"type": "string", "format": "binary"}},
    },
}


@router.get("", response_model=list[AdapterOut], dependencies=_READ)
async def list_adapters(services: TheServices, caller: TheCaller) -> list[AdapterOut]:
    """All adapters by name: the shared ones, and those of the API key."""
    return [entry_of(served) for served in services.registry.list(caller.name)]


@router.get("/{name}", response_model=AdapterOut, dependencies=_READ, responses=errors(404, 503))
async def get_adapter(name: AdapterName, services: TheServices, caller: TheCaller) -> AdapterOut:
    """One adapter."""
    return entry_of(services.registry.get(name, caller.name))


@router.put(
    "/{name}",
    response_model=AdapterOut,
    dependencies=_WRITE,
    responses={201: {"model": AdapterOut, "description": "Created."}, **errors(404, 408, 409, 413, 415, 503, 507)},
    openapi_extra={"requestBody": _UPLOAD_BODY},
)
async def put_adapter(
    name: AdapterName,
    request: Request,
    response: Response,
    services: TheServices,
    caller: TheCaller,
    renest: Annotated[
        bool | None, Query(description="Rotate a plain LoRA so that it can be served at every rank (default true).")
    ] = None,
) -> AdapterOut:
    """Create or replace an adapter. Requests in flight keep the version they started with."""
    services.check_accepting()
    registry = services.registry
    # The name is claimed before the first byte is read: the second of two uploads learns it at once.
    with registry.writing(name, caller), registry.new_upload() as folder:
        files, in_form = await receive_upload(
            request.headers.get("content-type", ""),
            request.stream(),
            folder,
            max_bytes=services.settings.max_adapter_bytes,
        )
        if None not in (renest, in_form) and renest != in_form:
            raise InvalidRequest("renest", f"{renest} in the query contradicts {in_form} in the form; give one")
        wants_renest = next((each for each in (renest, in_form) if each is not None), True)
        served, is_new = await changes.put_adapter(services, name, files, caller, renest=wants_renest)
    response.status_code = 201 if is_new else 200
    return entry_of(served)


@router.delete("/{name}", status_code=204, dependencies=_WRITE, responses=errors(404, 409, 503))
async def delete_adapter(name: AdapterName, services: TheServices, caller: TheCaller) -> None:
    """Delete an adapter. Requests in flight keep it until they end."""
    await changes.delete_adapter(services, name, caller)


@router.get("/{name}/export", response_class=FileResponse, dependencies=_READ, responses=errors(404, 503, 507))
async def export_adapter(
    name: AdapterName,
    services: TheServices,
    caller: TheCaller,
    rank: Annotated[int | None, Query(ge=1, description="Rank to export; the largest unless given.")] = None,
) -> Response:
    """A PEFT checkpoint of one rank, as a zip: the same function in any reader of PEFT files."""
    await services.exports.acquire()
    with ExitStack() as stack:
        stack.callback(services.exports.release)
        scratch = stack.enter_context(services.registry.new_upload())
        path, rank = await to_thread.run_sync(services.registry.export, name, rank, scratch, caller.name)
        return _ScratchFile(str(path), f"{name}-rank{rank}.zip", stack.pop_all())


class _ScratchFile(FileResponse):
    """A file that is removed once it is sent, or the client is gone."""

    def __init__(self, path: str, filename: str, cleanup: ExitStack) -> None:
        super().__init__(path, media_type="application/zip", filename=filename)
        self._cleanup = cleanup

    async def __call__(self, scope: types.Scope, receive: types.Receive, send: types.Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._cleanup.close()
