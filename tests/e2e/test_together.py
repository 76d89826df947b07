"""Issue story: 32 requests at once over 4 adapters, 4 ranks and the base; each answers what it answers alone."""

from pathlib import Path
from typing import Any

from tests.e2e.tiny_server import Client, together

RANKS = (1, 3, 8, 16)


def test_32_requests_at_once_say_what_they_say_alone(client: Client, adapter_folders: tuple[Path, ...]) -> None:
    names = [f"together-{number}" for number in range(len(adapter_folders))]
    for name, folder in zip(names, adapter_folders, strict=True):
        client.put(name, folder).raise_for_status()
    choices: list[dict[str, Any]] = [{"adapter_id": name, "rank": rank} for name in names for rank in RANKS]
    requests = [*choices, *[{}] * 4, *choices[:12]]
    alone = [client.tokens(tokens=40, **choice) for choice in requests]
    small_before = client.metric("dylora_batch_rows_bucket", le="16.0")
    steps_before = client.metric("dylora_batch_rows_count")

    assert together(client, requests, tokens=40) == alone

    small_steps = client.metric("dylora_batch_rows_bucket", le="16.0") - small_before
    assert client.metric("dylora_batch_rows_count") - steps_before > small_steps, "never more than 16 ran side by side"
    assert len({tuple(tokens) for tokens in alone}) == len(choices) + 1, "two of the choices say the same"
    for name in names:
        client.http.delete(f"/adapters/{name}").raise_for_status()
