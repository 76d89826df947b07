"""What can be measured and written, by the names that options have for it. No numpy, no torch: help comes at once."""

from enum import StrEnum

REPORT_SUFFIXES = (".json", ".md", ".png", ".svg")
"""Of the files that a report can be written to."""


class MetricName(StrEnum):
    """Metrics as `--metrics` and data formats name them; the loss is always measured."""

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
