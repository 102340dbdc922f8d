"""The servers that are compared: how each is started, and what it may use.

Each gets what its own documentation recommends for a CPU, the same number of threads, and the same bytes
for KV, which it fills in its own format. Nothing outside this file knows one peer from another.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import dormouse
from benchmarks.compare.install import GGUF, MLX_MODEL, PEERS_DIR, installed_version
from dormouse.domain.cache_spec import CacheSpec, KVFormat
from dormouse.settings import Settings

THREADS = 2
CONTEXT_LENGTH = 8192
BF16_TOKEN_NBYTES = 23040
"""KV of one token of SmolLM2-135M: 30 layers, K and V, 3 heads of 64 values of 2 bytes."""

_Q8_0, _Q4_0 = 34 / 32, 18 / 32
"""Bytes per value in llama.cpp's formats: blocks of 32 values with a 16-bit scale."""
_EOS = "2"
_ON_MLX = {"dormouse-mlx": "--runtime mlx"}
_DORMOUSE_WEIGHTS = {"torch": "safetensors, packed by default", "mlx": "safetensors, computed with in fp32"}


@dataclass(frozen=True)
class KVBudget:
    """Bytes for KV in memory, for all agents together, and how many requests run at most at once."""

    nbytes: int
    streams: int


@dataclass(frozen=True)
class Launch:
    """A command and what it finds in its environment, beside what this process has."""

    command: list[str]
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Slots:
    """Saving and restoring a conversation by hand, for the server that offers nothing else."""

    save: str
    restore: str


@dataclass(frozen=True)
class Peer:
    """A server: its version, None if it is not installed, and what the page says about it.

    `fields` go into every request body; `model` is the name it serves the model by.
    """

    name: str
    version: str | None
    weights: str
    kv: str
    kv_token_nbytes: float
    model: str
    launch: Callable[[int, Path, KVBudget], Launch]
    fields: dict[str, Any] = field(default_factory=lambda: {"ignore_eos": True})
    store: str | None = None
    """The folder below the server's own in which agents sleep; None if they do not."""

    slots: Slots | None = None
    ours: bool = False
    only: frozenset[str] = frozenset()
    """The workloads that it is measured in; all, if none is named."""

    def describe(self) -> dict[str, Any]:
        """What a row needs to be read later; the commands are shown for 1 GB of KV."""
        shown = self.launch(8000, Path("DATA"), KVBudget(10**9, 16))
        return {
            "version": self.version,
            "ours": self.ours,
            "weights": self.weights,
            "kv": self.kv,
            "kv_token_nbytes": round(self.kv_token_nbytes),
            "command": _without_folders(shlex.join(shown.command)),
            "environment": {key: _without_folders(value) for key, value in shown.environment.items()},
        }


def peers(model: Path, dormouse_flags: dict[str, str]) -> list[Peer]:
    """All of them; Dormouse once for each of `dormouse_flags` (names, and flags of `dormouse serve`), and
    once on mlx."""
    on_mlx = {name: flags for name, flags in _ON_MLX.items() if name not in dormouse_flags}
    variants = [_dormouse(name, shlex.split(flags)) for name, flags in (dormouse_flags | on_mlx).items()]
    return [*variants, _vllm(model), *_llamacpp(), *_mlx()]


def _dormouse(name: str, flags: list[str]) -> Peer:
    parser = argparse.ArgumentParser(add_help=False)
    default = Settings.model_fields["kv_format"].default
    parser.add_argument("--kv-format", type=KVFormat, default=default)
    parser.add_argument("--runtime", choices=("torch", "mlx"), default="torch")
    parsed = parser.parse_known_args(flags)[0]
    kv_format: KVFormat = parsed.kv_format
    cache = CacheSpec.for_heads(
        kv_format,
        Settings.model_fields["block_size"].default,
        num_layers=30,
        num_kv_heads=3,
        k_head_dim=64,
        v_head_dim=64,
    )

    def launch(port: int, folder: Path, budget: KVBudget) -> Launch:
        arena = budget.nbytes // cache.block_nbytes * cache.block_size
        command = [sys.executable, "-m", "dormouse", "serve", "--port", str(port), "--threads", str(THREADS)]
        command += ["--data-dir", str(folder / name), "--arena-tokens", str(arena), *flags]
        return Launch(command)

    return Peer(
        name=name,
        version=_dormouse_version(parsed.runtime),
        weights=_DORMOUSE_WEIGHTS[parsed.runtime] + (f"; flags {shlex.join(flags)}" if flags else ""),
        kv=str(kv_format),
        kv_token_nbytes=cache.token_nbytes,
        store=name,
        ours=True,
        model="smollm2",
        launch=launch,
    )


def _dormouse_version(runtime: str) -> str | None:
    """None where the library that computes is not installed."""
    try:
        return f"Dormouse {dormouse.__version__} on {runtime} {importlib.metadata.version(runtime)}"
    except importlib.metadata.PackageNotFoundError:
        return None


def _vllm(model: Path) -> Peer:
    def launch(port: int, folder: Path, budget: KVBudget) -> Launch:
        del folder
        # Not the `vllm` command: it asks for the metadata of a package that this build is not called.
        command = [_python("vllm"), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
        command += ["--served-model-name", "smollm2", "--host", "127.0.0.1", "--port", str(port)]
        command += ["--dtype", "bfloat16", "--max-model-len", str(CONTEXT_LENGTH)]
        command += ["--kv-cache-memory-bytes", str(budget.nbytes), "--enable-prefix-caching"]
        # Its documentation asks for this OpenMP, which its package brings along.
        openmp = PEERS_DIR / "vllm" / "venv" / "lib" / "libiomp5.so"
        environment = {
            "LD_PRELOAD": str(openmp),
            "VLLM_CPU_OMP_THREADS_BIND": f"0-{THREADS - 1}",
            "VLLM_CACHE_ROOT": str(PEERS_DIR / "vllm" / "cache"),
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        return Launch(command, environment)

    return Peer(
        name="vllm",
        version=installed_version("vllm"),
        weights="safetensors, bf16",
        kv="bf16",
        kv_token_nbytes=BF16_TOKEN_NBYTES,
        model="smollm2",
        launch=launch,
    )


def _llamacpp() -> list[Peer]:
    """llama.cpp with the KV that it has by default, and with as many bits of it as Dormouse has by default.

    Only `decode` is asked of the second one: it reads prompts at half of the first one's speed.
    """
    values = BF16_TOKEN_NBYTES // 2
    same_bits = (_Q8_0 + _Q4_0) / 2 * values
    return [
        _llamacpp_with("llamacpp", "f16", "f16", 2.0 * values, frozenset()),
        _llamacpp_with("llamacpp-q8q4", "q8_0", "q4_0", same_bits, frozenset({"decode"})),
    ]


def _llamacpp_with(name: str, k_type: str, v_type: str, token_nbytes: float, only: frozenset[str]) -> Peer:
    def launch(port: int, folder: Path, budget: KVBudget) -> Launch:
        # Every stream has a buffer of its own: in the unified one each would walk over all others' cells.
        # What the buffers leave of the budget is its cache of sleeping prompts in memory.
        spare = budget.nbytes - budget.streams * CONTEXT_LENGTH * token_nbytes
        slots = folder / f"{name}-slots"
        slots.mkdir(parents=True, exist_ok=True)
        command = [str(PEERS_DIR / "llamacpp" / "build" / "bin" / "llama-server"), "--model", str(GGUF)]
        command += ["--host", "127.0.0.1", "--port", str(port), "--alias", "smollm2"]
        command += ["--threads", str(THREADS), "--threads-batch", str(THREADS)]
        command += ["--parallel", str(budget.streams), "--ctx-size", str(budget.streams * CONTEXT_LENGTH)]
        command += ["--cache-type-k", k_type, "--cache-type-v", v_type, "--flash-attn", "on"]
        command += ["--cache-ram", str(max(0, int(spare / 2**20))), "--slot-save-path", str(slots)]
        return Launch(command)

    return Peer(
        name=name,
        version=installed_version("llamacpp"),
        weights="GGUF, Q4_1",
        kv=k_type if k_type == v_type else f"{k_type}/{v_type}",
        kv_token_nbytes=token_nbytes,
        model="smollm2",
        launch=launch,
        slots=Slots("/slots/0?action=save", "/slots/0?action=restore"),
        only=only,
    )


def _mlx() -> list[Peer]:
    """mlx-lm's own server, and vllm-mlx, both over the weights of Dormouse on mlx in fp32.

    vllm-mlx is made for Apple silicon: where it does not install or start, its rows say so.
    """

    def mlx_lm(port: int, folder: Path, budget: KVBudget) -> Launch:
        del folder
        flags = ["--model", str(MLX_MODEL), "--host", "127.0.0.1", "--port", str(port)]
        flags += ["--prompt-cache-bytes", str(budget.nbytes), "--prompt-cache-size", "64"]
        return _mlx_launch("mlx", "mlx_lm.server", flags)

    def vllm_mlx(port: int, folder: Path, budget: KVBudget) -> Launch:
        del folder
        flags = ["serve", str(MLX_MODEL), "--served-model-name", "smollm2"]
        flags += ["--host", "127.0.0.1", "--port", str(port), "--continuous-batching"]
        flags += ["--cache-memory-mb", str(budget.nbytes // 2**20)]
        return _mlx_launch("vllm-mlx", "vllm_mlx.cli", flags)

    return [
        _mlx_peer("mlx", "default_model", mlx_lm),
        _mlx_peer("vllm-mlx", "smollm2", vllm_mlx),
    ]


def _mlx_peer(name: str, model: str, launch: Callable[[int, Path, KVBudget], Launch]) -> Peer:
    return Peer(
        name=name,
        version=installed_version(name),
        weights="safetensors, fp32",
        kv="fp32",
        kv_token_nbytes=2 * BF16_TOKEN_NBYTES,
        model=model,
        launch=launch,
        fields={"logit_bias": {_EOS: -100}},  # they know no ignore_eos
    )


def _mlx_launch(peer: str, module: str, flags: list[str]) -> Launch:
    command = [_python(peer), str(Path(__file__).parent / "mlx_launcher.py"), module, *flags]
    threads = str(THREADS)
    return Launch(command, {"MKL_NUM_THREADS": threads, "OMP_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1"})


def _python(name: str) -> str:
    return str(PEERS_DIR / name / "venv" / "bin" / "python")


def _without_folders(text: str) -> str:
    """A command as it is the same on every machine."""
    for folder, word in ((PEERS_DIR, "build/peers"), (Path(__file__).parent, "benchmarks/compare")):
        text = text.replace(str(folder), word)
    return text.replace(sys.executable, "python").replace(str(Path.home()), "~")
