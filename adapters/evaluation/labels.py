"""Measuring a classifier: its loss, and the classes that it predicts."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional
from transformers import PreTrainedModel

from adapters.evaluation.label_metrics import LABEL_METRICS
from adapters.evaluation.metric import Metric, ratio
from adapters.evaluation.names import MetricName
from adapters.evaluation.resampling import Array
from adapters.training.encoding import EncodedText, LabelledDataset, LabelledPad

LABEL_LOSS = Metric("loss per example", False, ratio)
"""Cross entropy in nats."""


class LabelledSet:
    """Labelled texts, encoded once: cross entropy, and metrics of the predicted classes.

    Attributes:
        metrics: the loss, then those asked for.
        lost: see `EvaluationSet`.
    """

    def __init__(
        self,
        texts: Sequence[EncodedText],
        classes: int,
        metrics: Sequence[MetricName],
        *,
        pad_token_id: int,
        batch_size: int = 32,
    ) -> None:
        """Take texts as `encode_labelled` gives them.

        Args:
            texts: at least one.
            classes: how many there are.
            metrics: of LABEL_METRICS.
            pad_token_id: the model's.
            batch_size: rows of a forward pass.
        """
        self._lengths = [len(text.input_ids) for text in texts]
        self._truth = np.array([text.label for text in texts])
        self._rows, self._collate = LabelledDataset(texts), LabelledPad(pad_token_id)
        self._classes, self._batch_size = classes, batch_size
        cut = sum(text.is_cut for text in texts)
        self.lost = f"{cut} of the texts cut to {max(self._lengths)} tokens" if cut else ""
        self._label_metrics = tuple(LABEL_METRICS[name] for name in metrics)
        self.metrics = (LABEL_LOSS, *self._label_metrics)

    def __len__(self) -> int:
        return len(self._truth)

    def statistics(self, model: PreTrainedModel) -> tuple[Array, ...]:
        """See `EvaluationSet.statistics`."""
        logits = self._logits(model)
        nats = functional.cross_entropy(logits, torch.from_numpy(self._truth), reduction="none").double().numpy()
        return self._statistics(nats, logits.argmax(dim=1).numpy())

    def majority(self) -> tuple[Array, ...]:
        """The statistics of one answer to everything: the most frequent class, with each class's share as its probability."""
        shares = np.bincount(self._truth, minlength=self._classes) / len(self)
        return self._statistics(-np.log(shares[self._truth]), np.full(len(self), shares.argmax()))

    def _statistics(self, nats: Array, predicted: npt.NDArray[np.int64]) -> tuple[Array, ...]:
        losses = np.stack([nats, np.ones(len(self))], axis=1)
        return (losses, *(metric.count(self._truth, predicted, self._classes) for metric in self._label_metrics))

    @torch.no_grad()
    def _logits(self, model: PreTrainedModel) -> torch.Tensor:
        """[examples, classes], in float32 on the CPU."""
        model.eval()
        by_length = sorted(range(len(self)), key=self._lengths.__getitem__)
        logits = torch.empty(len(self), self._classes)
        for start in range(0, len(self), self._batch_size):
            rows = by_length[start : start + self._batch_size]
            batch = self._collate([self._rows[i] for i in rows])
            inputs = {name: tensor.to(model.device) for name, tensor in batch.items() if name != "labels"}
            logits[rows] = model(**inputs).logits.float().cpu()
        return logits
