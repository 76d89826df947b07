"""A Ray of two processors and what it starts, until standard input ends: python -m tests.cluster.ray_process

Each line of it is a path, for which `serve run` is called; `deployed` is written when Serve has the config.
"""

import sys
import tempfile

import ray
from ray import serve
from ray.serve.scripts import cli

_SMALLEST_STORE_BYTES = 80 << 20


def main() -> None:
    """Run until the end of standard input."""
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:  # short: names of sockets have a limit
        ray.init(
            num_cpus=2,
            object_store_memory=_SMALLEST_STORE_BYTES,
            include_dashboard=False,
            namespace="serve",
            _temp_dir=folder,
        )
        try:
            for line in sys.stdin:
                cli.main(["run", "--non-blocking", line.strip()], standalone_mode=False)
                print("deployed", flush=True)
        finally:
            serve.shutdown()
            ray.shutdown()


if __name__ == "__main__":
    main()
