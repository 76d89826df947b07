"""Uploads that must be refused: each is a way to spoil a sound adapter, with the status and words of its answer."""

import io
import json
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors.torch import load, save

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
PREFIX = "base_model.model.model.layers"
A = f"{PREFIX}.0.self_attn.q_proj.lora_A.weight"
B = f"{PREFIX}.0.self_attn.q_proj.lora_B.weight"

Files = dict[str, bytes]
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class BadUpload:
    """A spoiled upload.

    Attributes:
        says: what its answer names; every one of these.
        spoil: changes the two files of a sound adapter.
        body: makes the body and its content type from the files, where it is not multipart.
        name: the name it is put under.
    """

    title: str
    status: int
    says: tuple[str, ...]
    spoil: Callable[[Files], Files] = field(default=dict)
    body: Callable[[Files], tuple[bytes, str]] | None = None
    name: str = "bad"


def config(**changes: Any) -> Callable[[Files], Files]:
    """The config with these fields instead."""
    return lambda files: {**files, CONFIG: json.dumps({**json.loads(files[CONFIG]), **changes}).encode()}


def tensors(change: Callable[[Tensors], object]) -> Callable[[Files], Files]:
    """The tensors after `change`, which works in place."""

    def spoil(files: Files) -> Files:
        held = load(files[TENSORS])
        change(held)
        return {**files, TENSORS: save({name: tensor.contiguous() for name, tensor in held.items()})}

    return spoil


def without(name: str) -> Callable[[Files], Files]:
    """The files but one."""
    return lambda files: {n: content for n, content in files.items() if n != name}


def instead(name: str, content: bytes) -> Callable[[Files], Files]:
    """The files with one of them replaced or added."""
    return lambda files: {**files, name: content}


def rank(r: int) -> Callable[[Files], Files]:
    """Every factor blown up to a rank."""

    def grow(held: Tensors) -> None:
        for name, tensor in held.items():
            shape = (r, tensor.shape[1]) if "lora_A" in name else (tensor.shape[0], r)
            held[name] = torch.zeros(shape, dtype=torch.float16)

    return lambda files: config(r=r)(tensors(grow)(files))


def drop(*names: str) -> Callable[[Tensors], object]:
    """Remove tensors."""
    return lambda held: [held.pop(name) for name in names]


def put(name: str, tensor: torch.Tensor) -> Callable[[Tensors], object]:
    """Replace or add a tensor."""
    return lambda held: held.update({name: tensor})


def poison(value: float, *names: str) -> Callable[[Tensors], object]:
    """Set one number of each tensor."""
    return lambda held: [held[name].view(-1)[:1].fill_(value) for name in names]


def rename(old: str, new: str) -> Callable[[Tensors], object]:
    """Put everything of one module under the name of another."""
    return lambda held: [held.update({name.replace(old, new): held.pop(name)}) for name in list(held) if old in name]


def zipped(files: Mapping[str, bytes]) -> tuple[bytes, str]:
    """A zip of the files."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return packed.getvalue(), "application/zip"


HUGE_HEADER = (1 << 62).to_bytes(8, "little") + b"{}"
PICKLE = b"\x80\x04cos\nsystem\n(S'true'\ntR."
ZEROS = b"\0" * (4 << 20)
"""Four times what the tests' server takes."""

BAD_UPLOADS = (
    BadUpload("JSON instead of a form", 415, ("multipart",), body=lambda files: (b"{}", "application/json")),
    BadUpload("no content type", 415, ("multipart",), body=lambda files: (b"x", "")),
    BadUpload("no boundary", 422, ("boundary",), body=lambda files: (b"x", "multipart/form-data")),
    BadUpload("cut-off form", 422, ("multipart",), body=lambda f: (b"--b\r\n", "multipart/form-data; boundary=b")),
    BadUpload("no config", 422, (CONFIG, "missing"), without(CONFIG)),
    BadUpload("no tensors", 422, (TENSORS, "missing"), without(TENSORS)),
    BadUpload("a pickle", 422, ("adapter_model.bin",), lambda f: {CONFIG: f[CONFIG], "adapter_model.bin": PICKLE}),
    BadUpload("a pickle, renamed", 422, (TENSORS, "safetensors"), instead(TENSORS, PICKLE)),
    BadUpload("a part too many", 422, ("evil.py",), instead("evil.py", b"import os")),
    BadUpload("config that is no JSON", 422, (CONFIG, "JSON"), instead(CONFIG, b"{r: 8")),
    BadUpload("config that is no object", 422, (CONFIG,), instead(CONFIG, b"[]")),
    BadUpload("another method", 422, ("peft_type", "LOHA"), config(peft_type="LOHA")),
    BadUpload("layer replication", 422, ("layer_replication",), config(layer_replication=[[0, 1], [0, 1]])),
    BadUpload("Megatron", 422, ("megatron_config",), config(megatron_config={"tp": 2})),
    BadUpload("bare parameters", 422, ("target_parameters",), config(target_parameters=["mlp.experts"])),
    BadUpload("activated LoRA", 422, ("alora_invocation_tokens",), config(alora_invocation_tokens=[1, 2])),
    BadUpload("PiSSA, not converted", 422, ("pissa",), config(init_lora_weights="pissa")),
    BadUpload("DoRA", 422, ("use_dora",), config(use_dora=True)),
    BadUpload(
        "two wrongs, both refused",
        422,
        ("use_dora", "lora_B without lora_A"),
        lambda f: config(use_dora=True)(tensors(drop(A))(f)),
    ),
    BadUpload("rank of another config", 422, ("q_proj", "16", "rank 8"), config(r=8)),
    BadUpload("negative alpha", 422, ("lora_alpha",), config(lora_alpha=-1)),
    BadUpload("A without B", 422, ("q_proj", "lora_B"), tensors(drop(B))),
    BadUpload("B without A", 422, ("q_proj", "lora_A"), tensors(drop(A))),
    BadUpload("ranks that differ", 422, ("q_proj", "differ in rank"), tensors(put(A, torch.zeros(3, 32)))),
    BadUpload("NaN twice, both named", 422, (A, B, "NaN"), tensors(poison(float("nan"), A, B))),
    BadUpload("infinity", 422, (A, "Inf"), tensors(poison(float("inf"), A))),
    BadUpload("numbers that are integers", 422, (A, "dtype"), tensors(put(A, torch.zeros(16, 32, dtype=torch.int8)))),
    BadUpload("a tensor of no LoRA", 422, ("lora_C",), tensors(put(A.replace("lora_A", "lora_C"), torch.zeros(1)))),
    BadUpload("a rank above the limit", 422, ("rank 300", "256"), rank(300)),
    BadUpload(
        "a module that is not there",
        422,
        ("q_prox",),
        lambda f: tensors(rename("q_proj", "q_prox"))(
            config(target_modules=["q_prox", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])(f)
        ),
    ),
    BadUpload("a layer that is not there", 422, ("layers.7",), tensors(rename("layers.1", "layers.7"))),
    BadUpload("shapes of another base", 422, ("q_proj", "64"), tensors(put(A, torch.zeros(16, 64)))),
    BadUpload("a header that lies", 422, (TENSORS,), instead(TENSORS, HUGE_HEADER)),
    BadUpload("a file cut short", 422, (TENSORS,), lambda files: {**files, TENSORS: files[TENSORS][:-100]}),
    BadUpload("an empty file", 422, (TENSORS,), instead(TENSORS, b"")),
    BadUpload("too large", 413, (TENSORS, "1048576"), instead(TENSORS, ZEROS[: 3 << 19])),
    BadUpload("far too large", 413, ("body", "larger"), instead(TENSORS, ZEROS)),
    BadUpload("no zip at all", 422, ("zip",), body=lambda files: (b"PK\x03\x04nonsense", "application/zip")),
    BadUpload("an empty zip", 422, (CONFIG, TENSORS), body=lambda files: zipped({})),
    BadUpload("a zip that climbs out", 422, ("../evil",), body=lambda f: zipped({**f, "../evil": b"x"})),
    BadUpload("a zip bomb", 413, ("zip holds more",), body=lambda files: zipped({**files, TENSORS: ZEROS})),
    BadUpload("a name with a space", 422, ("a b",), name="a%20b"),
    BadUpload("a name that climbs", 422, ("..",), name="a..b"),
    BadUpload("a name that is hidden", 422, (".hidden",), name=".hidden"),
    BadUpload("the base's name", 422, ("base",), name="base"),
    BadUpload("a name too long", 422, ("name",), name="x" * 200),
)
