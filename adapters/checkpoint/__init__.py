"""PEFT checkpoints on disk: read, checked and written, never executed."""

from adapters.checkpoint.peft_reader import (
    CONFIG_FILE,
    QUALITY_FILE,
    TENSORS_FILE,
    CheckpointLimits,
    Description,
    describe_peft,
    read_peft,
    write_peft,
)

__all__ = [
    "CONFIG_FILE",
    "QUALITY_FILE",
    "TENSORS_FILE",
    "CheckpointLimits",
    "Description",
    "describe_peft",
    "read_peft",
    "write_peft",
]
