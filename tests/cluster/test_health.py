"""What a replica says when Serve asks how it is."""

import asyncio
from contextlib import ExitStack
from pathlib import Path

import pytest
from starlette.testclient import TestClient

pytest.importorskip("ray", reason="Ray is not installed here; `make test-ray` installs it")

from service.cluster import Replica
from service.errors import EngineDown
from tests.http_harness import parts

pytestmark = pytest.mark.ray


def test_a_replica_is_well_once_it_serves_its_adapters_and_until_its_engine_fails(tmp_path: Path) -> None:
    with parts(tmp_path) as (app, engine, _):
        replica = Replica.__new__(Replica)  # without Serve, which alone can say which replica it is
        replica._parts, replica._services = ExitStack(), app.state.services

        async def first_check(loads: ExitStack) -> None:
            asked = asyncio.create_task(replica.check_health())
            await asyncio.wait([asked], timeout=0.1)
            assert not asked.done()
            loads.close()  # they go on
            await asked

        with ExitStack() as loads:
            loads.enter_context(engine.hold_loads())
            with TestClient(app):
                asyncio.run(first_check(loads))
                assert app.state.services.registry.is_loaded
                engine.is_alive = False
                with pytest.raises(EngineDown):
                    asyncio.run(replica.check_health())
