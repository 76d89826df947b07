"""The adapters that the experiment asks: made up, of full size, with the quality curve that they claim."""

import io
import tempfile
import zipfile
from dataclasses import replace
from pathlib import Path

import httpx
import torch

from adapters.adapter import Adapter, LowRank
from adapters.checkpoint import read_peft, write_peft
from adapters.config import AdapterConfig, AdapterKind
from adapters.quality import Metric, QualityProfile
from loadtests.slo.client import adapter_name
from loadtests.slo.results import curve

SOURCE = "claimed by the experiment on latency objectives"


async def upload(http: httpx.AsyncClient, template: Path, count: int, rank: int) -> list[int]:
    """Upload adapters over the modules that the template adapts; their legal ranks."""
    shapes = {path: (each.a.shape[1], each.b.shape[0]) for path, each in read_peft(template).modules.items()}
    config = AdapterConfig(AdapterKind.DYLORA, rank, alpha=1.0)
    quality = QualityProfile((Metric("claimed", higher_is_better=True, values=curve(config.ranks)),), SOURCE)
    for number in range(count):
        generator = torch.Generator().manual_seed(number)

        def factor(*shape: int, generator: torch.Generator = generator) -> torch.Tensor:
            return 0.01 * torch.randn(*shape, generator=generator)

        modules = {path: LowRank(factor(rank, i), factor(o, rank)) for path, (i, o) in shapes.items()}
        content = _zip(replace(Adapter(config, modules), quality=quality))
        headers = {"Content-Type": "application/zip"}
        (await http.put(f"/adapters/{adapter_name(number)}", content=content, headers=headers)).raise_for_status()
    return list(config.ranks)


async def remove(http: httpx.AsyncClient, count: int) -> None:
    """Delete them again."""
    for number in range(count):
        (await http.delete(f"/adapters/{adapter_name(number)}")).raise_for_status()


def _zip(adapter: Adapter) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        write_peft(adapter, Path(folder))
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            for path in sorted(Path(folder).iterdir()):
                archive.write(path, path.name)
    return buffer.getvalue()
