"""The number formats of a model's weights, as options name them."""

from enum import StrEnum


class Dtype(StrEnum):
    """Number formats; what auto stands for, the option says."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
