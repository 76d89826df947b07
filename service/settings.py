"""Every setting of the server, in one frozen place. The command line and its help are made from these fields."""

import difflib
import hashlib
import ipaddress
import json
import os
import re
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

from platformdirs import user_cache_dir
from pydantic import ByteSize, Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from service.core import Compile
from service.rank.policies import Policy, PolicyBook, PolicyKind, WhenUnattainable

ENV_PREFIX = "DYLORA_"
DEMO_MODEL = "demo"
"""The value of `model` that means the small model shipped with the package."""

KIB = 1024
MIB = 1024 * 1024
Count = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Milliseconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Bytes = Annotated[ByteSize, Field(ge=0)]


class Device(StrEnum):
    """Where the model runs."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


class Dtype(StrEnum):
    """The number format of the base model's weights."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class LogLevel(StrEnum):
    """The least severe messages that are written."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


class LogFormat(StrEnum):
    """How log lines are written."""

    TEXT = "text"
    JSON = "json"


class SettingsError(Exception):
    """A setting that is unknown or has an illegal value; one line per offender."""


class Settings(BaseSettings):
    """What the server is told at start. Nothing changes it afterwards.

    Each field is read from `DYLORA_<NAME>` in the environment, and `dylora serve --<name>` overrides that.
    Sizes in bytes accept units: `512MiB`, `2GB`.
    """

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, frozen=True, extra="forbid", env_ignore_empty=True)

    model: str = Field(DEMO_MODEL, min_length=1, description="base model: 'demo', a local folder, or a hub name")
    revision: str | None = Field(None, description="branch, tag or commit of a hub model; of no other")
    host: str = Field("127.0.0.1", min_length=1, description="address to listen on; 0.0.0.0 for all interfaces")
    port: int = Field(8000, ge=0, le=65535, description="TCP port to listen on; 0 picks a free one")

    api_keys_file: Path | None = Field(
        None, description="JSON file of API keys, read again on SIGHUP; `dylora keys new` makes its entries"
    )
    api_keys: SecretStr | None = Field(None, description="the same JSON itself, in place of a file")
    allow_open: bool = Field(False, description="serve without API keys also where other machines can reach the server")
    allow_open_demo: bool = Field(False, description="the same for the demo model alone, as the Docker image has it")

    adapters_dir: Path = Field(
        default_factory=lambda data: _default_store(data.get("model", DEMO_MODEL)),
        description="folder of the adapter store, created if absent; unset: one for each model in the user's data folder",
    )
    adapters_shared: bool = Field(False, description="other servers have the same adapters_dir: serve what they put there")
    demo_adapters: bool = Field(True, description="put the demo's adapters into an empty store (demo model only)")
    lora_load_dir: Path | None = Field(None, description="folder that /v1/load_lora_adapter may load from; unset: it refuses")
    max_adapter_bytes: Bytes = Field(ByteSize(512 * MIB), description="largest adapter that may be uploaded")
    max_adapters: Count = Field(1000, description="most adapters in the store")
    max_store_bytes: Bytes = Field(ByteSize(16384 * MIB), description="most bytes of all adapters in the store")
    max_rank: Count = Field(256, description="largest rank of an adapter")

    device: Device = Field(Device.AUTO, description="where the model runs; auto takes a GPU if there is one")
    dtype: Dtype = Field(Dtype.AUTO, description="number format of the weights; auto: float32 on CPU, else the model's")
    threads: int | None = Field(None, ge=1, description="CPU threads for tensor work; unset leaves torch's choice")
    compile: Compile = Field(
        Compile.AUTO, description="machine code for this processor: auto compiles kernels, and the blocks of large models"
    )
    max_running_requests: Count = Field(64, description="most requests in one batch")
    max_waiting_requests: Count = Field(256, description="most requests in the queue; more are answered with 503")
    max_batch_tokens: Count = Field(512, description="token budget of one step, prompt chunks and decode rows together")
    prefill_chunk_tokens: Count = Field(
        6, description="of a prompt that enters beside others that generate, and one more for each of these; of several, more"
    )
    kv_cache_bytes: Bytes = Field(ByteSize(512 * MIB), description="memory for keys and values")
    kv_block_tokens: Count = Field(16, description="tokens per block of the key/value cache")
    prefix_cache: bool = Field(
        True, description="reuse keys and values of prompts that begin alike, at one adapter and rank; their timing shows it"
    )
    max_context_tokens: int | None = Field(None, ge=2, description="prompt plus answer; unset: what the model allows")
    merged_cache_bytes: Bytes = Field(ByteSize(512 * MIB), description="memory for merged weights; 0 never merges")
    merge_after_steps: Count = Field(8, description="steps of one (adapter, rank) alone before its weights are merged")

    max_new_tokens_limit: int | None = Field(None, ge=1, description="largest max_new_tokens of a request")
    max_prompt_tokens: int | None = Field(None, ge=1, description="longest prompt; unset: what the context leaves")
    max_body_bytes: Bytes = Field(ByteSize(2 * MIB), description="largest body of a request, uploads apart")
    max_header_bytes: Bytes = Field(ByteSize(32 * KIB), description="most bytes of a request's headers, its path included")
    max_headers: Count = Field(100, description="most headers of a request")
    max_connections: Count = Field(800, description="most connections; on more of them only /health and /ready are answered")
    max_unread_tokens: Count = Field(2048, description="tokens that the reader of a stream may fall behind before it is ended")

    request_timeout_s: Seconds = Field(600, description="longest a generation may take; a request may ask for less")
    header_timeout_s: Seconds = Field(10, description="seconds for a request's headers to arrive")
    body_timeout_s: Seconds = Field(20, description="seconds for a request's body, and more by min_body_bytes_per_s")
    min_body_bytes_per_s: Count = Field(1024, description="bytes of a body that buy it one more second")
    keep_alive_s: Seconds = Field(
        75, description="seconds that a connection may be idle between requests; longer than clients and proxies keep theirs"
    )
    write_timeout_s: Seconds = Field(60, description="seconds that a client may leave a full connection unread")

    default_policy: str = Field("quality", description="policy that chooses the rank where a request leaves it open")
    quality_tolerance: float = Field(0.01, ge=0, lt=1, description="relative loss accepted by the policy 'quality'")
    budget_share: float = Field(
        0.05, gt=0, description="adapter work per token, as a share of the base's, allowed by the policy 'budget'"
    )
    latency_slo_ms: Milliseconds | None = Field(None, description="end-to-end objective of the policy 'latency'")
    ttft_slo_ms: Milliseconds | None = Field(None, description="its objective for the first token")
    itl_slo_ms: Milliseconds | None = Field(None, description="its objective for the time between tokens, in the mean")
    slo_target: float = Field(0.99, gt=0, lt=1, description="share of requests that shall meet their objectives")
    slo_unattainable: WhenUnattainable = Field(
        WhenUnattainable.SERVE, description="where the policy 'latency' can't meet them: serve at its floor, or refuse with 503"
    )
    elastic_rank: bool = Field(
        True, description="the policy 'latency' may lower and raise the rank of a request while it runs, as the load changes"
    )
    latency_sweep_s: float = Field(
        10, ge=0, allow_inf_nan=False, description="longest sweep at start that measures steps, if none is cached; 0: none"
    )
    latency_cache_dir: Path = Field(
        default_factory=lambda: Path(user_cache_dir("dylora")) / "latency", description="folder of what sweeps have measured"
    )
    shadow_share: float = Field(
        0, ge=0, le=1, description="share of answers below the full rank that are scored at it while the server is idle"
    )
    adapter_policies: Annotated[dict[str, str], NoDecode] = Field(
        default_factory=dict, description='an adapter\'s own default policy, JSON: {"mr-to-text": "latency"}'
    )
    policies: Annotated[dict[str, Policy], NoDecode] = Field(
        default_factory=dict, description='further policies, JSON: {"fast": {"kind": "budget", "share": 0.01}}'
    )

    metrics_max_adapters: Count = Field(100, description="adapters with metric labels of their own; others share one")
    drain_timeout_s: float = Field(30, ge=0, allow_inf_nan=False, description="seconds that SIGTERM waits for requests")
    log_level: LogLevel = Field(LogLevel.INFO, description="least severe messages that are written")
    log_format: LogFormat = Field(LogFormat.TEXT, description="how they are written: one line of text, or of JSON, each")

    @field_validator("policies", "adapter_policies", mode="before")
    @classmethod
    def _policies_from_json(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        try:
            return json.loads(value)
        except ValueError as error:
            raise ValueError(f"not JSON: {error}") from None

    @model_validator(mode="after")
    def _policies_agree(self) -> "Settings":
        taken = sorted(set(self.policies) & {*_BUILT_IN})
        if taken:
            raise ValueError(f"policies: the name {taken[0]!r} is built in; choose another")
        try:
            book = self.policy_book()
        except ValueError as error:
            raise ValueError(f"default_policy: {error}") from None
        for adapter, name in self.adapter_policies.items():
            if name not in book.policies:
                legal = ", ".join(sorted(book.policies))
                raise ValueError(f"adapter_policies: {adapter}: {name!r} is no policy; legal: {legal}")
        return self

    @model_validator(mode="after")
    def _a_step_holds_every_row(self) -> "Settings":
        if self.max_batch_tokens < self.max_running_requests:
            raise ValueError(
                f"max_batch_tokens ({variable('max_batch_tokens')}): {self.max_batch_tokens} is not legal: at least"
                f" max_running_requests, {self.max_running_requests}, since each running request needs a token of every step"
            )
        return self

    @model_validator(mode="after")
    def _only_loopback_is_open(self) -> "Settings":
        if self.api_keys_file is not None and self.api_keys is not None:
            raise ValueError("api_keys_file and api_keys are both given; give one of the two")
        is_open = self.allow_open or (self.allow_open_demo and self.model == DEMO_MODEL)
        if not (self.api_keys_file or self.api_keys or is_open or _is_loopback(self.host)):
            raise ValueError(
                f"host ({variable('host')}): others can reach {self.host!r}, and there are no API keys. Give"
                f" --api-keys-file ({variable('api_keys_file')}; `dylora keys new` makes a key), listen on 127.0.0.1, or say"
                f" --allow-open ({variable('allow_open')}=true) to let everybody in"
            )
        return self

    def policy_book(self) -> PolicyBook:
        """The built-in policies and the configured ones, by name."""
        built_in = {
            "max": Policy(PolicyKind.MAX),
            "quality": Policy(PolicyKind.QUALITY, tolerance=self.quality_tolerance),
            "budget": Policy(PolicyKind.BUDGET, share=self.budget_share),
            "latency": Policy(
                PolicyKind.LATENCY,
                latency_slo_ms=self.latency_slo_ms,
                ttft_slo_ms=self.ttft_slo_ms,
                itl_slo_ms=self.itl_slo_ms,
                when_unattainable=self.slo_unattainable,
                elastic=self.elastic_rank,
            ),
        }
        return PolicyBook({**built_in, **self.policies}, self.default_policy)

    @classmethod
    def load(cls, overrides: Mapping[str, Any] | None = None) -> "Settings":
        """Read the overrides, then the environment where they are silent.

        Raises:
            SettingsError: an unknown DYLORA_ variable (the nearest legal name is given), or a value that is not legal.
        """
        problems = _unknown_variables(os.environ)
        if problems:
            raise SettingsError("\n".join(problems))
        try:
            return cls(**(overrides or {}))
        except ValidationError as error:
            raise SettingsError("\n".join(_describe(error))) from None


def _is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address; a name other than localhost may lead anywhere."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


_BUILT_IN = ("max", "quality", "budget", "latency")


def _default_store(model: str) -> Path:
    """A folder for each base model: the adapters of one do not fit another, and would only be listed as unfit."""
    name = re.sub(r"[^A-Za-z0-9]+", "-", model).strip("-")[-40:]
    identity = "" if model == DEMO_MODEL else "-" + hashlib.sha256(model.encode()).hexdigest()[:8]
    return _user_data_folder() / "adapters" / f"{name}{identity}"


def _user_data_folder() -> Path:
    """Where the XDG convention keeps what a user's programs must not lose."""
    base = os.environ.get("XDG_DATA_HOME", "")
    return (Path(base) if Path(base).is_absolute() else Path.home() / ".local" / "share") / "dylora"


def variable(field: str) -> str:
    """The environment variable of a setting."""
    return ENV_PREFIX + field.upper()


def _unknown_variables(environ: Mapping[str, str]) -> list[str]:
    legal = [variable(name) for name in Settings.model_fields]
    problems = []
    for key in sorted(environ):
        if key.upper().startswith(ENV_PREFIX) and key.upper() not in legal:
            near = difflib.get_close_matches(key.upper(), legal, n=1, cutoff=0.0)
            problems.append(f"{key}: no such setting; did you mean {near[0]}? `dylora settings` lists all")
    return problems


def _describe(error: ValidationError) -> list[str]:
    lines = []
    for item in error.errors(include_url=False, include_context=False):
        if item["type"] == "default_factory_not_called":
            continue  # a default that follows from other settings, which are wrong and told themselves
        message = item["msg"].removeprefix("Value error, ")
        where = [str(part) for part in item["loc"]]
        if where:
            message = f"{'.'.join(where)} ({variable(where[0])}): {item['input']!r:.100} is not legal: {message}"
        lines.append(message)
    return lines
