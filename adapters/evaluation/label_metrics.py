"""Metrics of predicted classes, each from as few counts of an example as it needs: a task may have hundreds of classes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from adapters.evaluation.metric import Metric, ratio
from adapters.evaluation.names import MetricName
from adapters.evaluation.resampling import Array

Classes = npt.NDArray[np.int64]
"""The class of each example, [examples]."""


@dataclass(frozen=True)
class LabelMetric(Metric):
    """A metric of classes.

    Attributes:
        count: from true classes, predicted classes and the number of classes, what of each example is summed,
            [examples, statistics].
    """

    count: Callable[[Classes, Classes, int], Array]


def accuracy_counts(truth: Classes, predicted: Classes, classes: int) -> Array:
    """Whether the prediction is right, and 1."""
    return _columns(truth == predicted, np.ones(len(truth)))


def f1_counts(truth: Classes, predicted: Classes, classes: int) -> Array:
    """Of classes 0 and 1: whether both are 1, twice; and how many of them are."""
    return _columns(2 * truth * predicted, truth + predicted)


def matthews_counts(truth: Classes, predicted: Classes, classes: int) -> Array:
    """Whether the prediction is right; then the true class and the predicted one, each as a one-hot row of all classes."""
    return np.concatenate([_columns(truth == predicted), _one_hot(truth, classes), _one_hot(predicted, classes)], axis=1)


def matthews(sums: Array) -> Array:
    """Matthews correlation, -1 to 1, of sums of `matthews_counts`, [..., 1 + 2 * classes].

    Gorodkin 2004's form for any number of classes; 0 where one side names a single class, as in scikit-learn.
    """
    right, true, predicted = sums[..., 0], *np.split(sums[..., 1:], 2, axis=-1)  # the latter [..., classes]
    total = true.sum(axis=-1)
    covariance = right * total - (true * predicted).sum(axis=-1)
    spread = (total**2 - (true**2).sum(axis=-1)) * (total**2 - (predicted**2).sum(axis=-1))
    return ratio(np.stack([covariance, np.sqrt(spread)], axis=-1))


def _columns(*columns: npt.ArrayLike) -> Array:
    return np.stack(columns, axis=1).astype(np.float64)


def _one_hot(chosen: Classes, classes: int) -> Array:
    rows = np.zeros((len(chosen), classes))
    rows[np.arange(len(chosen)), chosen] = 1
    return rows


LABEL_METRICS: Mapping[MetricName, LabelMetric] = MappingProxyType(
    {
        MetricName.ACCURACY: LabelMetric("accuracy", True, ratio, accuracy_counts),
        MetricName.F1: LabelMetric("F1", True, ratio, f1_counts),
        MetricName.MATTHEWS: LabelMetric("Matthews correlation", True, matthews, matthews_counts),
    }
)
