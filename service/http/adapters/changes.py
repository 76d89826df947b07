"""Changing the adapters of a running server, with all that is kept beside them."""

from functools import partial
from pathlib import Path

from anyio import to_thread

from service.http.adapters.served_adapter import ServedAdapter
from service.http.services import Services
from service.keys import ApiKey


async def put_adapter(
    services: Services, name: str, folder: Path, caller: ApiKey, *, renest: bool = True
) -> tuple[ServedAdapter, bool]:
    """Store and serve what lies in a folder; True beside it if the name is new. Call inside `AdapterRegistry.writing`.

    Raises what AdapterRegistry.put raises.
    """
    put = partial(services.registry.put, name, folder, renest=renest, caller=caller)
    served, is_new = await to_thread.run_sync(put)
    services.latencies.forget(name)
    return served, is_new


async def delete_adapter(services: Services, name: str, caller: ApiKey) -> None:
    """Forget an adapter, and end what still measures it. Requests in flight keep it until they end.

    Raises:
        InvalidName, UnknownAdapter, NameTaken, AdapterBusy, NotReady, Draining: it can't be deleted, or not now.
    """
    services.check_accepting()
    with services.registry.writing(name, caller):
        await to_thread.run_sync(services.registry.delete, name, caller)
        services.latencies.forget(name)
    await services.calibrations.cancel_all_of(name)
