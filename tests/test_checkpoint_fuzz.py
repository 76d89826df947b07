"""Whatever bytes an upload has, the reader returns an adapter or raises InvalidAdapter: nothing else escapes."""

import json
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from adapters.adapter import Adapter
from adapters.checkpoint import CONFIG_FILE, QUALITY_FILE, TENSORS_FILE, read_peft
from adapters.checkpoint.peft_config import IGNORED_FIELDS, READ_FIELDS, REFUSED_FIELDS
from adapters.errors import InvalidAdapter
from tests.checkpoints import plain_config, plain_tensors, safetensors_bytes

GOOD_FILE = save(plain_tensors())
HEADER_LENGTH = int.from_bytes(GOOD_FILE[:8], "little")
GOOD_HEADER = json.loads(GOOD_FILE[8 : 8 + HEADER_LENGTH])
DATA = GOOD_FILE[8 + HEADER_LENGTH :]
NAMES = sorted(GOOD_HEADER)

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([0, -1, 1 << 31, 1 << 63, 10**400])
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["LORA", "q_proj", "all", "dylora", "renested", "F32", "\ud800", ".*", "(a+)+$"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=6,
)
config_fields = st.dictionaries(
    st.sampled_from(sorted({*READ_FIELDS, *IGNORED_FIELDS, *REFUSED_FIELDS, "dylora"})), json_values, max_size=4
)
blocks = st.fixed_dictionaries({"kind": json_values | st.just("dylora")}, optional={"alpha": json_values, "ranks": json_values})


def read(config: bytes, tensors: bytes, quality: bytes | None = None) -> Adapter | None:
    """The adapter, or None where it is refused."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / CONFIG_FILE).write_bytes(config)
        (folder / TENSORS_FILE).write_bytes(tensors)
        if quality is not None:
            (folder / QUALITY_FILE).write_bytes(quality)
        try:
            return read_peft(folder)
        except InvalidAdapter as error:
            assert error.problems
            assert all(problem.isprintable() for problem in error.problems)
            return None


GOOD_CONFIG = json.dumps(plain_config()).encode()


@settings(max_examples=150, deadline=None)
@given(fields=config_fields, block=st.none() | blocks)
def test_any_config(fields: dict[str, Any], block: dict[str, Any] | None) -> None:
    extra = {} if block is None else {"dylora": block}
    read(json.dumps({**plain_config(), **fields, **extra}).encode(), GOOD_FILE)


@settings(max_examples=100, deadline=None)
@given(config=st.binary(max_size=40) | json_values.map(lambda value: json.dumps(value).encode()))
def test_any_config_bytes(config: bytes) -> None:
    assert read(config, GOOD_FILE) is None


@settings(max_examples=150, deadline=None)
@given(
    name=st.sampled_from(NAMES),
    field=st.sampled_from(["dtype", "shape", "data_offsets", "", "name"]),
    value=json_values | st.lists(st.integers(-1, 400), max_size=3) | st.sampled_from(["F16", "BF16", "I64", "U8"]),
)
def test_any_header_field(name: str, field: str, value: Any) -> None:
    header = {key: dict(entry) for key, entry in GOOD_HEADER.items()}
    if field == "name":
        header[str(value)] = header.pop(name)
    elif field:
        header[name][field] = value
    else:
        header[name] = value
    read(GOOD_CONFIG, safetensors_bytes(header, DATA))


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_changed_byte_and_any_cut(data: st.DataObject) -> None:
    content = bytearray(GOOD_FILE)
    for _ in range(data.draw(st.integers(0, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(content)) | st.just(len(content)))
    read(GOOD_CONFIG, bytes(content[:cut]))


@settings(max_examples=50, deadline=None)
@given(quality=st.binary(max_size=20) | json_values.map(lambda value: json.dumps({"metrics": value}).encode()))
def test_any_quality_profile(quality: bytes) -> None:
    assert read(GOOD_CONFIG, GOOD_FILE, quality) is None


def test_the_starting_point_is_good() -> None:
    assert read(GOOD_CONFIG, GOOD_FILE) is not None
