"""Metrics as `--metrics` names them; data formats say theirs in the same words."""

from enum import StrEnum


class MetricName(StrEnum):
    """What can be measured; the loss always is."""

    LOSS = "loss"
    PERPLEXITY = "perplexity"
    BLEU = "bleu"
    CHRF = "chrf"
    ROUGE_L = "rouge_l"
    SLOT_F1 = "slot_f1"
    SLOT_COVERAGE = "slot_coverage"
    ACCURACY = "accuracy"
    F1 = "f1"
    MATTHEWS = "matthews"
