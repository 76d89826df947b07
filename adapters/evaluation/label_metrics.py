"""Metrics of predicted classes, from the counts of (true class, predicted class)."""

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from adapters.evaluation.metric import Metric, ratio
from adapters.evaluation.names import MetricName
from adapters.evaluation.resampling import Array


def confusion(truth: npt.ArrayLike, predicted: npt.ArrayLike, classes: int) -> Array:
    """Each example's cell of the confusion matrix as a one-hot row, [examples, classes * classes], true class first."""
    cells = np.asarray(truth) * classes + np.asarray(predicted)
    rows: Array = np.eye(classes * classes)[cells]
    return rows


def accuracy(sums: Array) -> Array:
    """Share of right predictions, 0 to 1, of a summed confusion matrix [..., classes * classes]."""
    matrix = _matrix(sums)
    right = np.trace(matrix, axis1=-2, axis2=-1)
    return ratio(np.stack([right, matrix.sum(axis=(-2, -1))], axis=-1))


def f1(sums: Array) -> Array:
    """F1 of class 1, 0 to 1, of a summed 2 x 2 confusion matrix [..., 4]; 0 where nobody names that class."""
    matrix = _matrix(sums)
    agreed = 2 * matrix[..., 1, 1]
    return ratio(np.stack([agreed, matrix[..., 1, :].sum(axis=-1) + matrix[..., :, 1].sum(axis=-1)], axis=-1))


def matthews(sums: Array) -> Array:
    """Matthews correlation, -1 to 1, of a summed confusion matrix [..., classes * classes].

    Gorodkin 2004's form for any number of classes; 0 where one side names a single class, as in scikit-learn.
    """
    matrix = _matrix(sums)
    true, predicted = matrix.sum(axis=-1), matrix.sum(axis=-2)  # [..., classes]
    total, right = matrix.sum(axis=(-2, -1)), np.trace(matrix, axis1=-2, axis2=-1)
    covariance = right * total - (true * predicted).sum(axis=-1)
    spread = (total**2 - (true**2).sum(axis=-1)) * (total**2 - (predicted**2).sum(axis=-1))
    return ratio(np.stack([covariance, np.sqrt(spread)], axis=-1))


def _matrix(sums: Array) -> Array:
    classes = round(sums.shape[-1] ** 0.5)
    return sums.reshape(*sums.shape[:-1], classes, classes)


LABEL_METRICS: Mapping[MetricName, Metric] = MappingProxyType(
    {
        MetricName.ACCURACY: Metric("accuracy", True, accuracy),
        MetricName.F1: Metric("F1", True, f1),
        MetricName.MATTHEWS: Metric("Matthews correlation", True, matthews),
    }
)
