"""`dylora serve`, which checks at its end that the engine holds nothing of requests that are gone: exit status 3 if it does."""

import sys

from service import launch
from service.core import EngineObserver, EngineProtocol
from service.engine.engine import Engine
from service.settings import Settings

LEAKED = 3


def main() -> int:
    """Serve until a signal."""
    engines: list[EngineProtocol] = []

    def make_engine(settings: Settings, observer: EngineObserver) -> EngineProtocol:
        engines.append(launch.real_engine(settings, observer))
        return engines[-1]

    status = launch.serve(Settings.load(), make_engine)
    for engine in engines:
        assert isinstance(engine, Engine)
        try:
            engine.check_integrity()  # stopped: every block and row must be free
        except AssertionError as error:
            print(f"integrity: {error}", file=sys.stderr)
            return LEAKED
    return status


if __name__ == "__main__":
    sys.exit(main())
