"""Zips of adapters: packed and unpacked whole, and suspect ones refused before a byte is written outside."""

import io
import stat
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters.checkpoint import CONFIG_FILE, QUALITY_FILE, TENSORS_FILE
from adapters.errors import AdapterTooLarge, InvalidAdapter
from adapters.store.archive import pack_zip, unpack_zip

FILES = {CONFIG_FILE: b"{}", TENSORS_FILE: b"\0" * 1000}


def make_zip(entries: Mapping[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> io.BytesIO:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return buffer


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_what_is_packed_is_unpacked(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    for name, content in (FILES | {QUALITY_FILE: b"[]", "README.md": b"not ours"}).items():
        (source / name).write_bytes(content)
    pack_zip(source, tmp_path / "a.zip")
    pack_zip(source, tmp_path / "b.zip")
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()
    with (tmp_path / "a.zip").open("rb") as file:
        unpack_zip(file, target, max_bytes=10_000)
    assert contents(target) == FILES | {QUALITY_FILE: b"[]"}


@pytest.mark.parametrize("prefix", ["", "my-adapter/", "./"])
def test_files_may_lie_at_the_top_or_in_one_folder(tmp_path: Path, prefix: str) -> None:
    others = {
        "README.md": b"#",
        "__MACOSX/._adapter_config.json": b"x",
        f"{prefix}checkpoint-1/nested/{CONFIG_FILE}": b"x",
    }
    unpack_zip(make_zip({prefix + name: content for name, content in FILES.items()} | others), tmp_path, max_bytes=10_000)
    assert contents(tmp_path) == FILES


def test_an_entry_without_a_name_is_refused(tmp_path: Path) -> None:
    packed = make_zip(FILES)
    with zipfile.ZipFile(packed, "a") as archive:
        entry = zipfile.ZipInfo("x")
        entry.filename = ""  # which the constructor would not take
        archive.writestr(entry, b"{}")
    with pytest.raises(InvalidAdapter, match="zip entry '': it has no name"):
        unpack_zip(packed, tmp_path, max_bytes=10_000)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({}, "lacks adapter_config.json"),
        ({CONFIG_FILE: b"{}"}, "lacks adapter_model.safetensors"),
        ({CONFIG_FILE: b"{}", "adapter_model.bin": b"x"}, "found 'adapter_config.json', 'adapter_model.bin'"),
        ({f"a/b/c/{CONFIG_FILE}": b"{}"}, "lacks adapter_config.json"),
        ({f"a/{CONFIG_FILE}": b"{}", f"b/{TENSORS_FILE}": b""}, "more than one adapter: 'a', 'b'"),
        (FILES | {"../evil": b"x"}, "'../evil': its name leads out of the folder"),
        (FILES | {"a/../../evil": b"x"}, "leads out of the folder"),
        (FILES | {"/etc/evil": b"x"}, "'/etc/evil': its name leads out of the folder"),
        (FILES | {"..\\evil": b"x"}, "leads out of the folder"),
        (FILES | {"C:/evil": b"x"}, "leads out of the folder"),
        ({"../evil": b"x", "/other": b"x"}, "'/other': its name leads out"),
    ],
    ids=str,
)
def test_a_zip_without_an_adapter_or_with_suspect_names_is_refused(
    tmp_path: Path, entries: dict[str, bytes], message: str
) -> None:
    target = tmp_path / "target"
    target.mkdir()
    with pytest.raises(InvalidAdapter) as caught:
        unpack_zip(make_zip(entries), target, max_bytes=10_000)
    assert message in str(caught.value)
    assert contents(target) == {}
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_a_link_is_refused(tmp_path: Path) -> None:
    buffer = make_zip(FILES)
    with zipfile.ZipFile(buffer, "a") as archive:
        link = zipfile.ZipInfo(QUALITY_FILE)
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(InvalidAdapter, match="a symbolic link"):
        unpack_zip(buffer, tmp_path, max_bytes=10_000)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_name_that_appears_twice_is_refused(tmp_path: Path) -> None:
    buffer = make_zip(FILES)
    with zipfile.ZipFile(buffer, "a") as archive:
        archive.writestr(CONFIG_FILE, "other")
    with pytest.raises(InvalidAdapter, match="appears more than once"):
        unpack_zip(buffer, tmp_path, max_bytes=10_000)


def test_two_spellings_of_one_path_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidAdapter, match="appears more than once"):
        unpack_zip(make_zip(FILES | {f"./{CONFIG_FILE}": b"other"}), tmp_path, max_bytes=10_000)


def test_a_name_cut_at_a_nul_is_refused(tmp_path: Path) -> None:
    raw = make_zip(FILES | {"a_very_plain_name": b"x"}).getvalue().replace(b"a_very_plain_name", b"a_very\0plain_name")
    with pytest.raises(InvalidAdapter):
        unpack_zip(io.BytesIO(raw), tmp_path, max_bytes=10_000)


def test_an_encrypted_entry_is_refused(tmp_path: Path) -> None:
    raw = bytearray(make_zip(FILES).getvalue())
    directory = raw.index(b"PK\x01\x02")
    raw[directory + 8] |= 1
    with pytest.raises(InvalidAdapter, match="encrypted"):
        unpack_zip(io.BytesIO(raw), tmp_path, max_bytes=10_000)


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_only_deflate_is_unpacked(tmp_path: Path, method: int) -> None:
    with pytest.raises(InvalidAdapter, match="a method other than deflate"):
        unpack_zip(make_zip(FILES, method), tmp_path, max_bytes=10_000)


def test_bytes_are_counted_as_they_come_out(tmp_path: Path) -> None:
    bomb = make_zip({CONFIG_FILE: b"{}", TENSORS_FILE: b"\0" * 30_000_000})
    assert len(bomb.getvalue()) < 100_000
    with pytest.raises(AdapterTooLarge, match="more than 1000000 bytes"):
        unpack_zip(bomb, tmp_path, max_bytes=1_000_000)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 4_000_000


def test_a_size_that_is_a_lie_does_not_raise_the_limit(tmp_path: Path) -> None:
    raw = bytearray(make_zip({CONFIG_FILE: b"{}", TENSORS_FILE: b"\0" * 3_000_000}).getvalue())
    position = raw.rindex(b"PK\x01\x02")
    raw[position + 24 : position + 28] = struct.pack("<L", 10)
    with pytest.raises(InvalidAdapter):
        unpack_zip(io.BytesIO(raw), tmp_path, max_bytes=1_000_000)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 1_000_000


def test_the_limit_itself_is_allowed(tmp_path: Path) -> None:
    total = sum(map(len, FILES.values()))
    with pytest.raises(AdapterTooLarge):
        (tmp_path / "1").mkdir()
        unpack_zip(make_zip(FILES), tmp_path / "1", max_bytes=total - 1)
    (tmp_path / "2").mkdir()
    unpack_zip(make_zip(FILES), tmp_path / "2", max_bytes=total)


def test_too_many_entries_are_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterTooLarge, match="300 entries, the limit is 256"):
        unpack_zip(make_zip({f"{i}": b"" for i in range(300)}), tmp_path, max_bytes=10_000)


@pytest.mark.parametrize(
    "edit",
    [
        lambda raw, end: struct.pack_into("<L", raw, end + 12, 1 << 30),
        lambda raw, end: raw.__setitem__(slice(end, end), b"PK\x06\x07" + bytes(16)),
    ],
    ids=["directory size", "zip64"],
)
def test_a_directory_that_claims_too_much_is_refused_unread(tmp_path: Path, edit: Callable[[bytearray, int], None]) -> None:
    raw = bytearray(make_zip(FILES).getvalue())
    edit(raw, raw.rindex(b"PK\x05\x06"))
    with pytest.raises(AdapterTooLarge, match="directory is too large"):
        unpack_zip(io.BytesIO(raw), tmp_path, max_bytes=10_000)


GOOD = make_zip(FILES | {"README.md": b"hello"}).getvalue()


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_whatever_the_bytes_only_invalid_adapter_escapes(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    raw = bytearray(GOOD)
    for _ in range(data.draw(st.integers(0, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(raw)) | st.just(len(raw)))
    folder = tmp_path_factory.mktemp("zip")
    path = folder / "upload"
    path.write_bytes(bytes(raw[:cut]))
    (folder / "target").mkdir()
    with path.open("rb") as file:
        try:
            unpack_zip(file, folder / "target", max_bytes=10_000)
        except InvalidAdapter as error:
            assert all(problem.isprintable() for problem in error.problems)
    assert {found.name for found in folder.iterdir()} == {"upload", "target"}
    assert {found.name for found in (folder / "target").iterdir()} <= set(FILES) | {QUALITY_FILE}
