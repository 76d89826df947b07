"""PEFT checkpoints on disk: read, checked and written, never executed."""

from adapters.checkpoint.peft_reader import Description, describe_peft, read_peft
from adapters.checkpoint.peft_writer import CONFIG_FILE, TENSORS_FILE, write_peft
from adapters.limits import CheckpointLimits
from adapters.quality import QUALITY_FILE

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
