"""What the store knows of one adapter, and the names and digests that may become paths."""

import re
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from adapters.config import AdapterConfig
from adapters.errors import AdapterNotFound, InvalidAdapter, InvalidName
from adapters.json_file import read_json
from adapters.quality import QualityProfile

LEGAL_NAMES = 'a letter or digit, then up to 63 letters, digits, ".", "_" or "-"; no ".."; not "base"'
"""What `check_name` takes, for error messages and documentation."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_MAX_NAME_FILE_BYTES = 1 << 16


def check_name(name: str) -> None:
    """Raise InvalidName unless `name` may name an adapter. "base" is the base model's."""
    if not _NAME.fullmatch(name) or ".." in name or name == "base":
        raise InvalidName(name, LEGAL_NAMES)


def is_digest(text: str) -> bool:
    """Whether `text` may name a version."""
    return _DIGEST.fullmatch(text) is not None


@dataclass(frozen=True)
class StoredAdapter:
    """One name's current version.

    Attributes:
        name: the adapter's name.
        version: SHA-256 of the stored content, in hex; equal content has an equal version.
        config: kind, ranks, scale.
        targets: last part of the adapted modules' paths (`q_proj`), sorted.
        nbytes: size of the stored files in bytes.
        quality: measured quality per rank, if known.
        created: when the name came to lead to this version, UTC.
        owner: to whom the name belongs, in the words of whoever put it; None for an adapter that is shared.
    """

    name: str
    version: str
    config: AdapterConfig
    targets: tuple[str, ...]
    nbytes: int
    quality: QualityProfile | None
    created: datetime
    owner: str | None = None


@dataclass(frozen=True)
class NameRecord:
    """What a name's file says: the version it leads to, since when, and whose it is."""

    version: str
    created: datetime
    owner: str | None = None

    def to_json(self) -> dict[str, str]:
        """As `read_name_file` reads it."""
        content = {"version": self.version, "created": self.created.isoformat()}
        return content if self.owner is None else {**content, "owner": self.owner}


def version_folder(versions: Path, version: str) -> Path:
    """A version's folder.

    Raises:
        AdapterNotFound: `version` is not a digest, so no path is built from it.
    """
    if not is_digest(version):
        raise AdapterNotFound(version)
    return versions / version


def read_name_file(path: Path) -> NameRecord:
    """The version that a name leads to, since when, and whose it is.

    Raises:
        InvalidAdapter: the file is damaged.
    """
    content = read_json(path, max_bytes=_MAX_NAME_FILE_BYTES)
    try:
        if not isinstance(content, dict) or not is_digest(content["version"]):
            raise ValueError(content)
        owner = content.get("owner")
        if not (owner is None or (isinstance(owner, str) and owner)):
            raise ValueError(owner)
        return NameRecord(content["version"], datetime.fromisoformat(content["created"]), owner)
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidAdapter([f"{path.name}: must have a version (a SHA-256) and a time created"]) from error
