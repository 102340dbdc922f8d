"""Every setting, declared once: the flag, the environment variable, the name in the file and the
documentation come from here. `cli/config.py` reads the sources and says which of them is wrong."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import platformdirs
from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from dormouse.domain.cache_spec import MAX_BLOCK_SIZE, MIN_BLOCK_SIZE, KVFormat

ENV_PREFIX = "DORMOUSE_"

_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/?#\s]+")
_HOST = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_])?")


class Settings(BaseSettings):
    """Flags win over the environment (`DORMOUSE_` and the name in capitals), which wins over the file, which
    wins over the defaults."""

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, extra="forbid", frozen=True, allow_inf_nan=False)

    host: str = Field("127.0.0.1", description="Address of the server.")
    port: int = Field(8000, ge=0, le=65535, description="Port of the server; `serve` takes a free one for 0.")
    model: str = Field(
        "smollm2",
        description="A model folder, `smollm2` (embedded), the name of an imported model, or a "
        "Hugging Face id.",
    )
    aliases: str = Field(
        "claude-*,gpt-*,chatgpt-*,codex-*,o1*,o3*,o4*,default",
        description="Model names that mean whatever is served: patterns with commas between them, none if "
        "empty. The names of models on this machine are no aliases.",
    )
    auto_swap: Literal["on", "off"] = Field(
        "off", description="on lets a request's `model` decide which model of this machine is served."
    )
    swap_stay_s: float = Field(
        30, ge=0, description="With auto-swap, how long a model is served at least, in seconds."
    )
    swap_wait_s: float = Field(
        60,
        ge=0,
        description="How long a request may wait for a model, in seconds; then it gets a 503.",
    )
    data_dir: Path = Field(
        default_factory=lambda: platformdirs.user_data_path("dormouse"),
        description="Folder of the block files and the catalog. One server owns it at a time.",
    )
    models_dir: Path = Field(
        default_factory=lambda: platformdirs.user_cache_path("dormouse") / "models",
        description="Folder of imported models.",
    )
    kv_format: KVFormat = Field(
        KVFormat.K8V4, description="How K and V are stored: bf16, q8, k8v4 or q4 (and f32, exact and large)."
    )
    block_size: int = Field(
        128,
        ge=MIN_BLOCK_SIZE,
        le=MAX_BLOCK_SIZE,
        description="Tokens of a block: a power of two. Agents of one block size are unknown to another.",
    )
    arena_tokens: int | None = Field(
        None,
        ge=32,
        description="Tokens of KV kept in memory. By default a quarter of the free memory, "
        "one full context at least and 32 at most.",
    )
    context_length: int | None = Field(
        None,
        ge=2,
        description="Tokens of prompt and reply together. By default what the model was trained for; "
        "more needs `--rope-scaling`.",
    )
    rope_scaling: Literal["none", "linear", "yarn"] = Field(
        "none",
        description="How positions beyond the trained context are made; yarn is the usual way. KV computed "
        "under one scaling is unknown to another.",
    )
    rope_factor: float | None = Field(
        None,
        ge=1,
        description="How many times the trained context the scaling reaches. By default as far as "
        "`--context-length` asks; give it to keep the stored KV when that changes.",
    )
    runtime: Literal["auto", "torch", "mlx"] = Field(
        "auto",
        description="What computes: auto is mlx on Apple silicon, torch elsewhere. On Linux mlx needs the "
        "extra `mlx`. Agents of one are agents of the other.",
    )
    threads: int | None = Field(None, ge=1, description="Compute threads. By default one per core.")
    device: Literal["cpu", "cuda", "mps"] = Field(
        "cpu", description="Where torch computes; mlx takes Metal, or the CPU where there is none."
    )
    dtype: Literal["auto", "bf16", "fp32"] = Field(
        "auto", description="Compute precision; auto is bf16 where the processor has it."
    )
    weights: Literal["auto", "bf16", "int8", "int4"] = Field(
        "auto",
        description="How weights are held; auto is 4 bits for weights that were 4 bits in their file's "
        "origin, else 8 bits, or bf16 where there are no native kernels. mlx takes them as they are in the "
        "folder.",
    )
    max_running: int = Field(64, ge=1, description="Sequences in a step.")
    max_queue: int = Field(256, ge=0, description="Requests that may wait; more are answered with 429.")
    step_tokens: int = Field(
        512, ge=1, description="Prompt tokens computed in a step, beside the decoding sequences."
    )
    speculation: Literal["auto", "off"] = Field(
        "auto",
        description="Compute tokens ahead where a reply quotes what was said before; replies are the same.",
    )
    request_timeout_s: float = Field(600, gt=0, description="A request that takes longer is cut, in seconds.")
    grace_s: float = Field(
        20, ge=0, description="How long running requests may go on after SIGTERM, in seconds."
    )
    durability: Literal["async", "sync"] = Field(
        "async", description="sync answers the end of an agent's reply only when it is on disk."
    )
    encryption: Literal["off", "file", "keyring"] = Field(
        "off",
        description="Encrypt the data folder, with the master key in a file or in the system's keyring.",
    )
    encryption_key_file: Path = Field(
        default_factory=lambda: platformdirs.user_config_path("dormouse") / "master.key",
        description="File of the master key. It is made with a new data folder if there is none; keep a copy "
        "of it, and neither in the data folder.",
    )
    disk_quota_gb: float = Field(
        20, gt=0, description="Bound on all bytes below the data folder, in GB (10^9 bytes)."
    )
    max_body_mb: float = Field(16, gt=0, description="Bound on a request's body, in MB (10^6 bytes).")
    insecure: bool = Field(
        False, description="Serve beyond the loopback address although no API key is set: for everybody."
    )
    cors_origins: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="Web origins whose pages may call the server, with commas between them; * is any."
    )
    allowed_hosts: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="Names by which a server without API keys may be called, beside `localhost`, "
        "`*.internal`, its addresses, its `--host` and the machine's own name, with commas between them; "
        "* is any.",
    )
    requests_per_minute: int | None = Field(
        None, ge=1, description="Bound on each API key's requests; more are answered with 429."
    )
    tokens_per_minute: int | None = Field(
        None, ge=1, description="Bound on each API key's tokens, computed and generated; found ones are free."
    )
    agent_requests_per_minute: int | None = Field(
        None, ge=1, description="Bound on each agent's generations; more are answered with 429."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least level logged.")
    log_format: Literal["text", "json"] = Field(
        "text", description="Log lines for people, or one JSON object a line for programs."
    )
    otlp_endpoint: str | None = Field(
        None,
        pattern=r"^https?://",
        description="URL of an OpenTelemetry collector (OTLP over HTTP) for a trace of each request; "
        "needs the extra `otel`.",
    )
    api_key: SecretStr | None = Field(
        None,
        description="The API key that commands send to a running server. Better set as a variable: flags "
        "are seen by all users of the machine.",
    )

    @property
    def disk_quota_nbytes(self) -> int:
        """`disk_quota_gb` in bytes."""
        return int(self.disk_quota_gb * 1e9)

    @property
    def max_body_nbytes(self) -> int:
        """`max_body_mb` in bytes."""
        return int(self.max_body_mb * 1e6)

    @field_validator("cors_origins", "allowed_hosts", mode="before")
    @classmethod
    def _split_list(cls, value: Any) -> Any:
        if isinstance(value, str):
            value = [part.strip() for part in value.split(",") if part.strip()]
        return value

    @field_validator("cors_origins")
    @classmethod
    def _are_origins(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for origin in value:
            if origin != "*" and not _ORIGIN.fullmatch(origin):
                raise ValueError(
                    f"'{origin}' is no origin; write it like http://localhost:3000, or * for any"
                )
        return value

    @field_validator("allowed_hosts")
    @classmethod
    def _are_names(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            if name != "*" and not _HOST.fullmatch(name):
                raise ValueError(
                    f"'{name}' is no name; write it like gpubox.lan, without a port, or * for any"
                )
        return value

    @field_validator("block_size")
    @classmethod
    def _is_power_of_two(cls, value: int) -> int:
        if value & (value - 1):
            raise ValueError("must be a power of two")
        return value

    @model_validator(mode="after")
    def _arena_holds_two_blocks(self) -> Self:
        if self.arena_tokens is not None and self.arena_tokens < 2 * self.block_size:
            raise ValueError(
                f"--arena-tokens {self.arena_tokens} is less than two blocks of {self.block_size}"
            )
        return self


CLIENT_SETTINGS = frozenset({"api_key"})
"""What only commands that talk to a server use; all others are flags of `dormouse serve`."""
