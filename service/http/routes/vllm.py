"""POST /v1/load_lora_adapter and /v1/unload_lora_adapter: vLLM's way to change the adapters of a running server."""

from functools import partial
from typing import Annotated, Any

from anyio import to_thread
from fastapi import APIRouter
from fastapi.responses import PlainTextResponse
from pydantic import ConfigDict, Field

from service.errors import InvalidRequest
from service.http.adapters.changes import delete_adapter, put_adapter
from service.http.adapters.load_folder import copy_from
from service.http.not_served import NotServed
from service.http.routes.common import (
    ADAPTER_NAME,
    NAME_SCHEMA,
    ONLY_KNOWN_QUERIES,
    TheCaller,
    TheServices,
    needs,
    openai_errors,
    plain_text,
)
from service.http.schemas import Body, Name, Switch, Text
from service.keys import Scope

router = APIRouter(
    prefix="/v1",
    tags=["vllm"],
    dependencies=[needs(Scope.ADAPTERS_WRITE), ONLY_KNOWN_QUERIES],
    responses=openai_errors(400, 401, 403, 404, 408, 409, 413, 429, 503, 507),
)

_DONE = plain_text("What vLLM says.")

LoraName = Annotated[Name, Field(description=ADAPTER_NAME, json_schema_extra=NAME_SCHEMA)]


class LoadRequest(Body):
    """A folder with a PEFT checkpoint, and what it shall be called."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"lora_name": "mine", "lora_path": "mine-checkpoint"}]})

    lora_name: LoraName
    lora_path: Annotated[Text, Field(max_length=4096)] = Field(
        description="A folder inside the server's lora_load_dir, relative to it or absolute."
    )
    load_inplace: Switch = Field(False, description="Replace the adapter of that name, if there is one.")
    base_model_name: Annotated[Any, NotServed(instead="the adapter must fit the model that is served")] = None


class UnloadRequest(Body):
    """The adapter that shall go."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"lora_name": "mine"}]})

    lora_name: LoraName
    lora_int_id: Annotated[Any, NotServed()] = None


@router.post("/load_lora_adapter", response_model=None, responses=_DONE)
async def load_lora_adapter(body: LoadRequest, services: TheServices, caller: TheCaller) -> PlainTextResponse:
    """Copy an adapter from a folder of the server's own disk into its store, and serve it. Off unless lora_load_dir is set."""
    services.check_accepting()
    await services.find_adapter(body.lora_name, caller.name)
    registry, settings, name = services.registry, services.settings, body.lora_name
    with registry.writing(name, caller), registry.new_upload() as folder:
        if not body.load_inplace and registry.holds(name):
            raise InvalidRequest("lora_name", f"{name!r} is loaded already; set load_inplace to replace it")
        copy = partial(copy_from, settings.lora_load_dir, body.lora_path, folder, max_bytes=settings.max_adapter_bytes)
        await to_thread.run_sync(copy)
        await put_adapter(services, name, folder, caller)
    return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")


@router.post("/unload_lora_adapter", response_model=None, responses=_DONE)
async def unload_lora_adapter(body: UnloadRequest, services: TheServices, caller: TheCaller) -> PlainTextResponse:
    """Delete an adapter, as DELETE /adapters/{id} does."""
    await delete_adapter(services, body.lora_name, caller)
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")
