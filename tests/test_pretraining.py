import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from adapters.training.pretraining import PretrainSettings, one_cycle, pretrain

SETTINGS = PretrainSettings(steps=8, report_steps=4, checkpoint_steps=3)


class Tiny(nn.Module):
    """A layer with matrices for Muon, and an embedding and a norm for AdamW."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(8, 4)
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.norm = nn.LayerNorm(4)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden: Tensor = self.embedding(tokens)
        for layer in self.layers:
            hidden = hidden + layer(hidden)
        loss: Tensor = self.norm(hidden)[:, 0].square().mean()
        return loss


def batches() -> Iterator[Tensor]:
    return (torch.tensor([step % 8, 3]) for step in itertools.count())


def trained(settings: PretrainSettings, checkpoint: Path | None = None) -> dict[str, Tensor]:
    model = Tiny()
    pretrain(model, batches(), model, lambda: 0.0, settings, checkpoint)
    return model.state_dict()


def test_the_learning_rate_is_that_of_torchs_one_cycle() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.0, total_steps=40, pct_start=0.2, cycle_momentum=False)
    for step in range(40):
        assert one_cycle(step, 40, 0.2) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-9)
        optimizer.step()
        schedule.step()


def test_a_stopped_pretraining_ends_where_the_uninterrupted_one_does(tmp_path: Path) -> None:
    whole = trained(SETTINGS)
    checkpoint = tmp_path / "checkpoint.safetensors"

    class Stopped(Exception):
        pass

    def stopping() -> float:
        raise Stopped

    model = Tiny()
    with pytest.raises(Stopped):  # at step 5, two steps after the last checkpoint
        pretrain(model, batches(), model, stopping, replace(SETTINGS, report_steps=5), checkpoint)
    resumed = trained(SETTINGS, checkpoint)
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())
