"""Adapters as zip files: unpacking what somebody else packed, and packing exports.

A zip is trusted in nothing: names, sizes, counts and offsets are claims. Only the three files of an adapter are written,
under names of ours, and the limit counts bytes as they come out.
"""

import errno
import stat
import struct
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from adapters.checkpoint import CONFIG_FILE, QUALITY_FILE, TENSORS_FILE
from adapters.errors import AdapterTooLarge, InvalidAdapter

ADAPTER_FILES = (CONFIG_FILE, TENSORS_FILE, QUALITY_FILE)
"""The files of an adapter's folder; quality.json may be absent."""

_MAX_ENTRIES = 256
# Python's zipfile reads the directory whole; an honest one of so many entries is far smaller.
_MAX_DIRECTORY_BYTES = 1 << 20
_CHUNK_BYTES = 1 << 20
_END = struct.Struct("<4s4H2LH")
_END_SIGNATURE = b"PK\x05\x06"
_ZIP64_LOCATOR = b"PK\x06\x07"
_ZIP64_LOCATOR_BYTES = 20
_MAX_COMMENT_BYTES = 0xFFFF


def unpack_zip(file: BinaryIO, folder: Path, *, max_bytes: int) -> None:
    """Write the adapter files that a zip holds, at its top level or in one folder, to `folder`.

    Other entries (PEFT's README.md, a tokenizer) are left out. After an error `folder` may hold part of the files.

    Args:
        file: the zip, seekable.
        folder: exists; has none of the files yet.
        max_bytes: limit on the bytes written, counted while they are unpacked.

    Raises:
        AdapterTooLarge: more than `max_bytes`, or too many entries.
        InvalidAdapter: not a zip, damaged, encrypted, or with a name that is absolute, climbs, repeats, or is a link.
    """
    try:
        _check_directory(file)
        with zipfile.ZipFile(file) as archive:
            chosen = _choose(archive.infolist())
            left = max_bytes
            for name, entry in chosen.items():
                left -= _extract(archive, entry, folder / name, left)
                if left < 0:
                    raise AdapterTooLarge([f"the zip holds more than {max_bytes} bytes"])
    # What zipfile and zlib raise on damaged input; RuntimeError is also its NotImplementedError.
    except (zipfile.BadZipFile, zlib.error, struct.error, EOFError, ValueError, OverflowError, RuntimeError) as error:
        raise InvalidAdapter([f"not a readable zip: {str(error)[:120]}"]) from error
    except OSError as error:
        if error.errno != errno.EINVAL:  # EINVAL: the zip named an offset before its own beginning
            raise
        raise InvalidAdapter(["not a readable zip: an offset outside the file"]) from error


def pack_zip(folder: Path, target: Path) -> None:
    """Pack an adapter's files into a new zip, uncompressed (tensors do not compress) and with fixed dates, so that the same
    files give the same bytes.
    """
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
        for name in ADAPTER_FILES:
            if (folder / name).is_file():
                entry = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
                entry.external_attr = 0o644 << 16
                entry.file_size = (folder / name).stat().st_size
                with (folder / name).open("rb") as source, archive.open(entry, "w") as sink:
                    while chunk := source.read(_CHUNK_BYTES):
                        sink.write(chunk)


def _check_directory(file: BinaryIO) -> None:
    """Bound the zip's directory before zipfile reads it into memory: it looks for the end record just so."""
    size = file.seek(0, 2)
    file.seek(max(0, size - _END.size - _MAX_COMMENT_BYTES))
    tail = file.read()
    bare = len(tail) - _END.size
    start = bare if tail[bare:].startswith(_END_SIGNATURE) and tail.endswith(b"\0\0") else tail.rfind(_END_SIGNATURE)
    if bare < 0 or start < 0 or start > bare:
        raise InvalidAdapter(["not a zip, or cut short"])
    directory_bytes = _END.unpack_from(tail, start)[5]
    has_zip64 = tail[:start][-_ZIP64_LOCATOR_BYTES:].startswith(_ZIP64_LOCATOR)
    if has_zip64 or directory_bytes > _MAX_DIRECTORY_BYTES:
        raise AdapterTooLarge([f"the zip's directory is too large; at most {_MAX_ENTRIES} entries, and no zip64"])


def _choose(entries: Sequence[zipfile.ZipInfo]) -> dict[str, zipfile.ZipInfo]:
    """The entries of the adapter's files, by file name, once no entry is suspect."""
    if len(entries) > _MAX_ENTRIES:
        raise AdapterTooLarge([f"the zip has {len(entries)} entries, the limit is {_MAX_ENTRIES}"])
    problems = [f"zip entry {entry.orig_filename[:120]!a}: {why}" for entry in entries if (why := _suspicion(entry))]
    names = [str(PurePosixPath(entry.filename)) for entry in entries]  # one spelling for "a/b", "./a//b"
    problems += [f"zip entry {name[:120]!a}: appears more than once" for name in sorted(set(names)) if names.count(name) > 1]
    if problems:
        raise InvalidAdapter(problems)
    files = [entry for entry in entries if not entry.is_dir() and not entry.filename.startswith("__MACOSX/")]
    candidates = [entry for entry in files if _is_adapter_file(entry)]
    folders = sorted({str(PurePosixPath(entry.filename).parent) for entry in candidates})
    if len(folders) > 1:
        raise InvalidAdapter([f"the zip holds more than one adapter: {', '.join(ascii(folder) for folder in folders)}"])
    chosen = {PurePosixPath(entry.filename).name: entry for entry in candidates}
    missing = [name for name in (CONFIG_FILE, TENSORS_FILE) if name not in chosen]
    if missing:
        found = ", ".join(ascii(entry.filename[:80]) for entry in files[:10]) or "nothing"
        raise InvalidAdapter([f"the zip lacks {name} at its top level or in one folder; found {found}" for name in missing])
    return chosen


def _is_adapter_file(entry: zipfile.ZipInfo) -> bool:
    path = PurePosixPath(entry.filename)
    return path.name in ADAPTER_FILES and len(path.parts) <= 2


def _suspicion(entry: zipfile.ZipInfo) -> str | None:
    """Why an entry makes the whole zip suspect, though perhaps it would not be unpacked."""
    name = entry.orig_filename  # before zipfile cut it at a NUL
    if not entry.filename:
        return "it has no name"
    if name.startswith("/") or "\\" in name or "\0" in name or ".." in name.split("/") or ":" in name.split("/")[0]:
        return "its name leads out of the folder"
    if stat.S_ISLNK(entry.external_attr >> 16):
        return "a symbolic link"
    if entry.flag_bits & 0x1:
        return "encrypted"
    # bzip2 and LZMA would let the file choose how much memory unpacking takes.
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return "compressed by a method other than deflate"
    return None


def _extract(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, target: Path, left: int) -> int:
    """Write one entry and return its bytes, which exceed `left` if there are more: the rest is not unpacked then."""
    written = 0
    with archive.open(entry) as source, target.open("xb") as sink:
        while written <= left and (chunk := source.read(_CHUNK_BYTES)):
            written += len(chunk)
            sink.write(chunk)
    return written
