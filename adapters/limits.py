"""How large an uploaded checkpoint may be."""

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class CheckpointLimits:
    """Bounds on an untrusted checkpoint, checked before anything of that size is allocated.

    Attributes:
        max_rank: columns of one module.
        max_bytes: size of the tensor file.
        max_tensors: number of tensors.
        max_header_bytes: size of the tensor file's JSON header.
        max_config_bytes: size of adapter_config.json.

    Raises:
        ValueError: a limit below 1, by name.
    """

    max_rank: int = 256
    max_bytes: int = 1 << 30
    max_tensors: int = 16_384
    max_header_bytes: int = 4 << 20
    max_config_bytes: int = 1 << 20

    def __post_init__(self) -> None:
        for field in fields(self):
            if getattr(self, field.name) < 1:
                raise ValueError(f"{field.name} must be at least 1, not {getattr(self, field.name)}")


OWN_FILES = CheckpointLimits(
    max_rank=1 << 16, max_bytes=1 << 40, max_tensors=1 << 20, max_header_bytes=1 << 28, max_config_bytes=1 << 26
)
"""For a checkpoint that its owner names on the command line: nothing honest comes near."""
