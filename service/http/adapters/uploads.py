"""Streams an upload to disk: multipart parts, or one zip. No name of a client becomes a path; nothing is read whole.

Every part is bounded while it is written; what the files hold is the store's business.
"""

from collections.abc import AsyncIterator, Mapping
from functools import partial
from pathlib import Path
from typing import BinaryIO

from anyio import to_thread
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from adapters.checkpoint import CONFIG_FILE, TENSORS_FILE
from adapters.errors import AdapterTooLarge
from adapters.quality import QUALITY_FILE
from adapters.store.archive import unpack_zip
from service.errors import InvalidRequest, UnsupportedUpload

ARCHIVE_PART = "archive"
RENEST_PART = "renest"
_SMALL_FILE_BYTES = 1024 * 1024
_BATCH_BYTES = 1024 * 1024
_MAX_OPTION_BYTES = 16
_ZIP_TYPES = ("application/zip", "application/x-zip-compressed")
_TRUTH = {"true": True, "1": True, "false": False, "0": False}

# What a part is, by its file name or else by its own name.
_PARTS: Mapping[str, str] = {
    CONFIG_FILE: CONFIG_FILE,
    "adapter_config": CONFIG_FILE,
    "config": CONFIG_FILE,
    TENSORS_FILE: TENSORS_FILE,
    "adapter_model": TENSORS_FILE,
    "model": TENSORS_FILE,
    QUALITY_FILE: QUALITY_FILE,
    "quality": QUALITY_FILE,
    ARCHIVE_PART: ARCHIVE_PART,
    RENEST_PART: RENEST_PART,
}


async def receive_upload(
    content_type: str, chunks: AsyncIterator[bytes], folder: Path, *, max_bytes: int
) -> tuple[Path, bool | None]:
    """Write an upload into a folder of ours.

    Args:
        content_type: of the request, with its boundary.
        folder: empty.
        max_bytes: limit on the tensor file, and on everything that a zip holds.

    Returns:
        The folder that holds the adapter's files, and the form field `renest` if it was sent.

    Raises:
        UnsupportedUpload: neither multipart nor zip.
        InvalidRequest: not well-formed, an unknown part, or one sent twice.
        AdapterTooLarge: above a limit.
    """
    kind, options = parse_options_header(content_type)
    if kind in (each.encode() for each in _ZIP_TYPES):
        sink: _ZipSink | _MultipartSink = _ZipSink(folder, max_bytes)
    elif kind == b"multipart/form-data":
        if not options.get(b"boundary"):
            raise InvalidRequest("Content-Type", "multipart/form-data without a boundary; let the client set it")
        sink = _MultipartSink(folder, max_bytes, options[b"boundary"])
    else:
        raise UnsupportedUpload(content_type)
    try:
        batch = bytearray()
        async for chunk in chunks:
            batch += chunk
            if len(batch) >= _BATCH_BYTES:
                # Disk and parser off the event loop, in pieces large enough to pay for the hop.
                await to_thread.run_sync(sink.write, bytes(batch))
                batch.clear()
        await to_thread.run_sync(sink.write, bytes(batch))
        files = await to_thread.run_sync(sink.finish)
    finally:
        sink.close()
    return files, sink.renest


class _ZipSink:
    """The body is the zip."""

    renest: bool | None = None

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        self._archive = _BoundedFile(folder / "upload.zip", ARCHIVE_PART, max_bytes)

    def write(self, data: bytes) -> None:
        self._archive.write(data)

    def finish(self) -> Path:
        self._archive.close()
        return _unpack(self._archive.path, self._folder, self._max_bytes)

    def close(self) -> None:
        self._archive.close()


class _MultipartSink:
    """The body is a form."""

    def __init__(self, folder: Path, max_bytes: int, boundary: bytes) -> None:
        self.renest: bool | None = None
        self._folder = folder
        self._max_bytes = max_bytes
        self._files = folder / "files"
        self._files.mkdir()
        self._seen: set[str] = set()
        self._headers: dict[bytes, bytes] = {}
        self._header_name = self._header_value = b""
        self._part = ""
        self._file: _BoundedFile | None = None
        self._option = b""
        self._is_complete = False
        callbacks = {
            "on_part_begin": self._on_part_begin,
            "on_header_field": partial(self._on_header, is_name=True),
            "on_header_value": partial(self._on_header, is_name=False),
            "on_header_end": self._on_header_end,
            "on_headers_finished": self._on_headers_finished,
            "on_part_data": self._on_part_data,
            "on_part_end": self._on_part_end,
            "on_end": self._on_end,
        }
        try:
            self._parser = MultipartParser(boundary, callbacks)  # type: ignore[arg-type]
        except FormParserError as error:
            raise InvalidRequest("Content-Type", str(error)) from None

    def write(self, data: bytes) -> None:
        try:
            self._parser.write(data)
        except FormParserError as error:
            raise InvalidRequest("body", f"not well-formed multipart: {error}") from None

    def finish(self) -> Path:
        if not self._is_complete:
            raise InvalidRequest("body", "the multipart body ends before its closing boundary")
        if ARCHIVE_PART not in self._seen:
            return self._files
        others = self._seen - {ARCHIVE_PART, RENEST_PART}
        if others:
            raise InvalidRequest("body", f"a zip and {', '.join(sorted(others))}; send one or the other")
        return _unpack(self._files / ARCHIVE_PART, self._folder, self._max_bytes)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _on_part_begin(self) -> None:
        self._headers = {}
        self._header_name = self._header_value = b""

    def _on_header(self, data: bytes, start: int, end: int, *, is_name: bool) -> None:
        if is_name:
            self._header_name += data[start:end]
        else:
            self._header_value += data[start:end]

    def _on_header_end(self) -> None:
        self._headers[self._header_name.lower()] = self._header_value
        self._header_name = self._header_value = b""

    def _on_headers_finished(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition"))
        self._part = part = _part_of(options.get(b"name", b""), options.get(b"filename", b""))
        if part in self._seen:
            raise InvalidRequest(part, "sent twice")
        self._seen.add(part)
        if part != RENEST_PART:
            limit = self._max_bytes if part in (TENSORS_FILE, ARCHIVE_PART) else _SMALL_FILE_BYTES
            self._file = _BoundedFile(self._files / part, part, limit)

    def _on_part_data(self, data: bytes, start: int, end: int) -> None:
        if self._file is not None:
            self._file.write(memoryview(data)[start:end])
            return
        self._option += data[start:end]
        if len(self._option) > _MAX_OPTION_BYTES:
            raise InvalidRequest(RENEST_PART, "legal: true, false")

    def _on_part_end(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
            return
        text = self._option.decode(errors="replace").strip().lower()
        if text not in _TRUTH:
            raise InvalidRequest(RENEST_PART, f"{text!r} is not legal; legal: true, false")
        self.renest = _TRUTH[text]

    def _on_end(self) -> None:
        self._is_complete = True


def _part_of(name: bytes, filename: bytes) -> str:
    """What a part is: one of our own names, never a piece of the client's."""
    # Some clients send a path as the file name; only its last piece is compared.
    base = filename.decode(errors="replace").replace("\\", "/").rpartition("/")[2]
    field = name.decode(errors="replace")
    if base in _PARTS:
        return _PARTS[base]
    if base.lower().endswith(".zip"):
        return ARCHIVE_PART
    if field in _PARTS:
        return _PARTS[field]
    legal = f"{CONFIG_FILE}, {TENSORS_FILE}, {QUALITY_FILE}, {ARCHIVE_PART} (a zip), {RENEST_PART}"
    raise InvalidRequest("body", f"unknown part {(base or field)[:80]!r}; legal: {legal}")


def _unpack(archive: Path, folder: Path, max_bytes: int) -> Path:
    target = folder / "unpacked"
    target.mkdir()
    with archive.open("rb") as file:
        unpack_zip(file, target, max_bytes=max_bytes)
    return target


class _BoundedFile:
    """A file that refuses to grow past a limit."""

    def __init__(self, path: Path, part: str, max_bytes: int) -> None:
        self.path = path
        self._part = part
        self._left = self._max_bytes = max_bytes
        self._file: BinaryIO = path.open("xb")

    def write(self, data: bytes | memoryview) -> None:
        self._left -= len(data)
        if self._left < 0:
            raise AdapterTooLarge([f"{self._part} is larger than the limit of {self._max_bytes} bytes"])
        self._file.write(data)

    def close(self) -> None:
        self._file.close()
