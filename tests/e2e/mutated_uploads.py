"""Uploads that hypothesis spoils: safetensors headers, configs, zips and multipart bodies, and connections that break off."""

import io
import json
import struct
import zipfile
import zlib
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from hypothesis import strategies as st

from tests.checkpoints import safetensors_bytes
from tests.e2e.bad_uploads import CONFIG, TENSORS, Files

BOMB_BYTES = 64 << 20
"""Unpacked: 64 times what the tests' server takes; a thousandth of it packed."""
_BOUNDARY = b"----boundary"
_FORM = "multipart/form-data; boundary=----boundary"
_SYMLINK = 0o120777 << 16

_numbers = st.sampled_from(
    [0, 1, -1, 7, 16, 1 << 31, 1 << 62, 1 << 63, 1 << 64, 10**400, 0.5, 1e308, float("nan"), float("inf")]
)
_words = st.sampled_from(
    ["", "F32", "F16", "BF16", "I64", "F8_E4M3", "LORA", "q_proj", "all-linear", "\ud800", "\0", ".*", "(a+)+$"]
)
_values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | _numbers | _words | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=5,
)
_PATHS = (
    *("../evil", "../../../../etc/passwd", "/etc/passwd", "a/../../evil", "..\\evil", "C:\\evil", "a\0b", "", ".", "..", "/"),
    *("adapter_config.json/", "./adapter_config.json", "x/adapter_config.json", "adapter_model.bin"),
    *("adapter_model.safetensors ", "adapter_model.safetensors\n", "n" * 300, "n/" * 200 + "x", "é" * 100),
    *("\u202egnp.nosj", "CON", "~/x", "$HOME", "-rf"),
)
_paths = st.sampled_from(_PATHS)
_CONTENT_TYPES = (
    *("multipart/form-data", "multipart/form-data; boundary=", "multipart/form-data; boundary=" + "b" * 300),
    *("multipart/form-data; boundary=\xff", "multipart/mixed; boundary=----boundary"),
    *("text/plain", "application/zip", "application/json"),
)
_HEADS = (
    *(b"", b"Content-Disposition: form-data\r\n", b"Content-Disposition: form-data; name=\r\n"),
    *(b"x" * 70_000 + b": y\r\n", b"\0: \0\r\n"),
)


@dataclass(frozen=True)
class Upload:
    """What is sent.

    Attributes:
        kept: bytes of the body that arrive before the connection breaks off; None for all.
    """

    content_type: str
    body: bytes = field(repr=False)
    kept: int | None = None


def uploads(sound: Files) -> st.SearchStrategy[Upload]:
    """Any of them, from the files of a sound adapter."""
    files = _with_tensors(sound) | _with_config(sound) | _with_bytes(sound)
    sent = files.map(_form) | files.map(lambda spoiled: _zip(list(spoiled.items()))) | _archives(sound) | _forms(sound)
    return st.tuples(sent, st.sampled_from([0, 0, 0, 1])).flatmap(
        lambda pair: _cut_off(pair[0]) if pair[1] else st.just(pair[0])
    )


def _with_tensors(sound: Files) -> st.SearchStrategy[Files]:
    """A header with a field of a tensor, a tensor, or its own length replaced; or of any JSON."""
    length = int.from_bytes(sound[TENSORS][:8], "little")
    header, data = json.loads(sound[TENSORS][8 : 8 + length]), sound[TENSORS][8 + length :]
    names = st.sampled_from(sorted(header))

    @st.composite
    def mutated(draw: st.DrawFn) -> Files:
        changed: dict[str, Any] = {name: dict(entry) for name, entry in header.items()}
        for _ in range(draw(st.integers(1, 2))):
            name, field = draw(names), draw(st.sampled_from(["dtype", "shape", "data_offsets", "name", "all", "metadata"]))
            value = draw(_values | st.lists(st.integers(-1, len(data) + 1), min_size=2, max_size=2))
            match field:
                case "name":
                    changed[str(value)] = changed.get(name, {})
                case "all":
                    changed[name] = value
                case "metadata":
                    changed["__metadata__"] = value
                case _ if isinstance(changed.get(name), dict):
                    changed[name][field] = value
        raw = json.dumps(changed).encode()
        told = draw(st.none() | st.sampled_from([0, 1, len(raw) - 1, len(raw) + 1, 1 << 20, 1 << 32, (1 << 64) - 1]))
        return {**sound, TENSORS: safetensors_bytes(raw, data, told)}

    any_header = _values.map(lambda value: {**sound, TENSORS: safetensors_bytes(json.dumps(value).encode(), data)})
    deep = st.integers(1, 20_000).map(lambda depth: {**sound, TENSORS: safetensors_bytes(b"[" * depth, data)})
    return mutated() | any_header | deep


def _with_config(sound: Files) -> st.SearchStrategy[Files]:
    config = json.loads(sound[CONFIG])
    changes = st.dictionaries(st.sampled_from([*sorted(config), "dylora", "quality"]), _values, min_size=1, max_size=3)
    spoiled = changes.map(lambda fields: {**sound, CONFIG: json.dumps({**config, **fields}).encode()})
    profile = _values.map(lambda value: {**sound, "quality.json": json.dumps({"metrics": value}).encode()})
    return spoiled | profile | _values.map(lambda value: {**sound, CONFIG: json.dumps(value).encode()})


def _with_bytes(sound: Files) -> st.SearchStrategy[Files]:
    """A few bytes of a file changed, the start most of all, or the file cut."""

    @st.composite
    def mutated(draw: st.DrawFn) -> Files:
        name = draw(st.sampled_from([CONFIG, TENSORS]))
        return {**sound, name: draw(_flipped(sound[name], 3000))}

    return mutated()


@st.composite
def _flipped(draw: st.DrawFn, content: bytes, start: int) -> bytes:
    changed = bytearray(content)
    for _ in range(draw(st.integers(0, 4))):
        changed[draw(st.integers(0, min(start, len(changed)) - 1))] = draw(st.integers(0, 255))
    return bytes(changed[: draw(st.just(len(changed)) | st.integers(0, len(changed)))])


def _archives(sound: Files) -> st.SearchStrategy[Upload]:
    """Zips with entries under any name, links, doubles and bombs, and zips that lie about what they hold."""
    entry = st.tuples(_paths, st.sampled_from([b"", b"x", b"{}", b"PK\x03\x04"]))
    link = st.tuples(
        st.sampled_from([CONFIG, TENSORS, "quality.json"]), st.sampled_from([b"/etc/passwd", b"../../x", b"/dev/zero"])
    )
    pairs = list(sound.items())
    strange = st.lists(entry, min_size=1, max_size=3).map(lambda more: _zip([*pairs, *more]))
    links = link.map(lambda each: _zip([pair for pair in pairs if pair[0] != each[0]], links=[each]))
    doubles = st.sampled_from(pairs).map(lambda pair: _zip([*pairs, pair]))
    bombs = st.sampled_from([TENSORS, CONFIG, "quality.json"]).map(_bomb)
    many = st.integers(3, 3000).map(lambda count: _zip([(f"f{number}", b"") for number in range(count)]))
    nested = st.just(_zip([("inner.zip", _zip(pairs).body)]))
    packed = _zip(pairs).body
    directory = packed.rindex(b"PK\x01\x02")

    @st.composite
    def lying(draw: st.DrawFn) -> Upload:
        changed = bytearray(packed)
        start = draw(st.sampled_from([0, directory - 100, directory, len(packed) - 22]))
        offset = min(len(changed) - 8, start + draw(st.integers(0, 60)))
        changed[offset : offset + 4] = struct.pack("<I", draw(st.sampled_from([0, 1, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF])))
        return Upload("application/zip", bytes(changed))

    flipped = _flipped(packed, len(packed)).map(lambda body: Upload("application/zip", body))
    return strange | links | doubles | bombs | many | nested | lying() | flipped


def _forms(sound: Files) -> st.SearchStrategy[Upload]:
    """Multipart bodies with strange parts, heads and boundaries."""
    whole = _form(sound).body
    parts = st.lists(st.tuples(_paths, st.sampled_from(list(sound.values()))), min_size=1, max_size=3)
    types = st.sampled_from(_CONTENT_TYPES)
    heads = st.sampled_from(_HEADS)
    odd_head = heads.map(
        lambda head: Upload(_FORM, b"--" + _BOUNDARY + b"\r\n" + head + b"\r\nx\r\n--" + _BOUNDARY + b"--\r\n")
    )
    renest = st.sampled_from([b"maybe", b"", b"x" * 5000]).map(lambda text: _form({**sound, "renest": text}))
    return (
        parts.map(lambda pairs: _form(dict(pairs) | sound))
        | types.map(lambda kind: Upload(kind, whole))
        | _flipped(whole, 600).map(lambda body: Upload(_FORM, body))
        | odd_head
        | renest
    )


def _cut_off(upload: Upload) -> st.SearchStrategy[Upload]:
    kept = st.integers(0, max(0, len(upload.body) - 1))
    return kept.map(lambda count: Upload(upload.content_type, upload.body, count))


def _form(files: Files) -> Upload:
    lines = b""
    for name, content in files.items():
        shown = name.encode(errors="surrogatepass").replace(b'"', b"%22").replace(b"\n", b"%0A").replace(b"\0", b"%00")
        lines += b'--%b\r\nContent-Disposition: form-data; name="%b"; filename="%b"\r\n\r\n' % (_BOUNDARY, shown, shown)
        lines += content + b"\r\n"
    return Upload(_FORM, lines + b"--" + _BOUNDARY + b"--\r\n")


def _zip(pairs: list[tuple[str, bytes]], links: list[tuple[str, bytes]] | None = None) -> Upload:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for name, content in pairs:
            _write(archive, _entry(name), content)
        for name, target in links or []:
            entry = _entry(name)
            entry.create_system, entry.external_attr = 3, _SYMLINK
            _write(archive, entry, target)
    return Upload("application/zip", packed.getvalue())


def _entry(name: str) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo("x")
    entry.filename = name  # as it is: the constructor would cut it at a zero byte
    return entry


def _write(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, content: bytes) -> None:
    archive.NameToInfo.pop(entry.filename, None)  # it warns of a double, which is wanted here
    archive.writestr(entry, content)


@cache
def _bomb(name: str) -> Upload:
    """A zip by hand: one entry of zeros, packed once, which tells its size or a small one."""
    compressor = zlib.compressobj(9, zlib.DEFLATED, -15)
    packed = b"".join([*(compressor.compress(bytes(1 << 20)) for _ in range(BOMB_BYTES >> 20)), compressor.flush()])
    crc = zlib.crc32(bytes(BOMB_BYTES))
    title = name.encode()
    fields = (20, 0, 8, 0, 0, crc, len(packed), BOMB_BYTES if name == TENSORS else 100)
    local = struct.pack("<4s5H3I2H", b"PK\x03\x04", *fields, len(title), 0) + title + packed
    central = struct.pack("<4s6H3I5H2I", b"PK\x01\x02", 20, *fields, len(title), 0, 0, 0, 0, 0, 0) + title
    end = struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 1, 1, len(central), len(local), 0)
    return Upload("application/zip", local + central + end)
