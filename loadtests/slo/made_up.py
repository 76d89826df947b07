"""The adapters that the experiment asks: made up, of full size, with the quality curve that they claim."""

import io
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import httpx
import torch

from adapters.adapter import Adapter, LowRank
from adapters.checkpoint import write_peft
from adapters.config import AdapterConfig, AdapterKind
from adapters.quality import Metric, QualityProfile
from loadtests.slo.client import adapter_name
from loadtests.slo.results import curve

SOURCE = "claimed by the experiment on latency objectives"


async def upload(http: httpx.AsyncClient, shapes: Mapping[str, tuple[int, int]], count: int, rank: int) -> list[int]:
    """Upload adapters over modules of these (in, out), unless they are there; their legal ranks."""
    config = AdapterConfig(AdapterKind.DYLORA, rank, alpha=1.0)
    quality = QualityProfile((Metric("claimed", higher_is_better=True, values=curve(config.ranks)),), SOURCE)
    known = {each["id"] for each in (await http.get("/adapters")).raise_for_status().json()}
    for number in range(count):
        if adapter_name(number) in known:
            continue
        generator = torch.Generator().manual_seed(number)

        def factor(*shape: int, generator: torch.Generator = generator) -> torch.Tensor:
            return 0.01 * torch.randn(*shape, generator=generator)

        modules = {path: LowRank(factor(rank, i), factor(o, rank)) for path, (i, o) in shapes.items()}
        content = _zip(replace(Adapter(config, modules), quality=quality))
        headers = {"Content-Type": "application/zip"}
        (await http.put(f"/adapters/{adapter_name(number)}", content=content, headers=headers)).raise_for_status()
    return list(config.ranks)


def _zip(adapter: Adapter) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        write_peft(adapter, Path(folder))
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            for path in sorted(Path(folder).iterdir()):
                archive.write(path, path.name)
    return buffer.getvalue()
