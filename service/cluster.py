"""Ray Serve: the application of one machine on every replica of a deployment, where one machine is too small.

    serve run service.cluster:app adapters_dir=/shared/adapters allow_open_demo=true

Arguments are settings. How many replicas there are, and what each may use of its machine, says Serve's config, as for any
deployment (docker/README.md). The only module that knows Ray.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from functools import cached_property
from typing import Any

from anyio import to_thread
from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle

from service import launch
from service.http.asgi.replica import NamedReplica
from service.http.services import Services
from service.log import entry, logger
from service.settings import Device, Settings, SettingsError, variable

DEPLOYMENT = "dylora"
"""What Serve's config calls it."""

OF_THE_PROXY = (
    *("host", "port", "max_connections", "max_headers", "max_header_bytes"),
    *("header_timeout_s", "keep_alive_s", "write_timeout_s", "max_unread_tokens"),
)
"""Settings that have no meaning where the connections are Serve's."""

_EVERY_ADDRESS = "0.0.0.0"
"""The proxy is there for other machines. So it has to be said who may come, as in a container."""
_PATHS = ("adapters_dir", "api_keys_file", "lora_load_dir", "latency_cache_dir")
_MORE_THAN_THE_ENGINE_TAKES = 2
"""The queue is the engine's, which knows whose turn it is and refuses what is too much: Serve's lets through what fills it."""
_STOP_S = 10
"""For what follows the requests at the end of a replica."""
_SCRAPE_S = 5
_LOADED_S = 1


class Replica:
    """One server of several. Serve calls its methods."""

    def __init__(self, settings: Settings) -> None:
        """Load the model, open the store. Raises what `launch.application` raises."""
        self._context = serve.get_replica_context()
        self._parts = ExitStack()
        self._app = self._parts.enter_context(launch.application(settings, launch.real_engine, self._scrapes))
        services = self._app.state.services
        assert isinstance(services, Services)
        self._services = services

    def __serve_build_asgi_app__(self) -> NamedReplica:
        """What answers requests. Serve runs its lifespan, which starts the engine and stops it."""
        return NamedReplica(self._app, self._context.replica_tag)

    async def check_health(self) -> None:
        """Wait until the stored adapters are served: asked the first time before any request is sent, and ever again.

        Raises:
            EngineDown: Serve puts another replica in the place of this one.
        """
        self._services.check_alive()
        while not await to_thread.run_sync(self._services.registry.wait_loaded, _LOADED_S):
            self._services.check_alive()

    def reconfigure(self, user_config: object) -> None:
        """Read the API keys again: `user_config` in Serve's config means nothing, but that it was changed."""
        self._services.tenants.reload()

    async def scrape(self) -> tuple[str, bytes]:
        """What this replica tells Prometheus, by its name."""
        return self._context.replica_tag, await to_thread.run_sync(self._services.metrics.exposition)

    def __del__(self) -> None:
        """Close what was opened, once the lifespan has ended."""
        self._parts.close()

    @cached_property
    def _everyone(self) -> DeploymentHandle:
        return serve.get_deployment_handle(self._context.deployment, self._context.app_name)

    async def _scrapes(self) -> Mapping[str, bytes]:
        """Those of all replicas that run; of this one alone where one of the others does not answer."""
        asked = self._everyone.broadcast("scrape")
        try:
            answers = await asked.results_async(timeout_s=_SCRAPE_S, return_exceptions=True)
        except TimeoutError:
            logger.warning(entry("a replica does not answer: metrics are told of one alone", replica=self._context.replica_tag))
            answers = [await self.scrape()]
        return dict(answer for answer in answers if not isinstance(answer, Exception))  # one may have ended since


def app(args: dict[str, Any]) -> Application:
    """What `serve run` and Serve's config name: a deployment for the settings that they give.

    Raises:
        SettingsError: a setting is unknown, not legal, or not for a replica.
    """
    settings = settings_of(args)
    deployment = serve.deployment(serve.ingress()(Replica)).options(
        name=DEPLOYMENT,
        ray_actor_options={
            "num_cpus": settings.threads or 1,  # without `threads` torch takes as many as Ray grants
            "num_gpus": 1 if settings.device is Device.CUDA else 0,
        },
        max_ongoing_requests=_MORE_THAN_THE_ENGINE_TAKES * (settings.max_running_requests + settings.max_waiting_requests),
        graceful_shutdown_timeout_s=settings.drain_timeout_s + _STOP_S,
    )
    return deployment.bind(settings)


def settings_of(args: Mapping[str, Any]) -> Settings:
    """The settings of every replica. Raises SettingsError, as `app`."""
    settings = Settings.load({**args, "host": _EVERY_ADDRESS, "adapters_shared": True})
    problems = [*_not_of_a_replica(args, settings), *_relative_paths(settings)]
    if problems:
        raise SettingsError("\n".join(problems))
    return settings


def _not_of_a_replica(args: Mapping[str, Any], settings: Settings) -> Iterator[str]:
    given = args.keys() | (settings.model_fields_set - {"host", "adapters_shared"})
    for field in OF_THE_PROXY:
        if field in given:
            yield f"{field} ({variable(field)}): the connections are the proxy's: see http_options in Serve's config"
    if "adapters_shared" in given:
        yield f"adapters_shared ({variable('adapters_shared')}): replicas always share their adapters; leave it out"
    if "adapters_dir" not in given:
        yield f"adapters_dir ({variable('adapters_dir')}): name the folder that all replicas share"


def _relative_paths(settings: Settings) -> Iterator[str]:
    paths = {field: str(path) for field in _PATHS if (path := getattr(settings, field)) is not None}
    if settings.model.startswith("."):
        paths["model"] = settings.model
    for field, path in paths.items():
        if not path.startswith("/"):
            yield f"{field} ({variable(field)}): {path!r} is not legal: replicas start in folders of their own; begin with /"
