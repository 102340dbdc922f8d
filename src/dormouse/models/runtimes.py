"""Which runtime computes: torch, or mlx on Apple silicon. Each is imported only when it is chosen."""

from __future__ import annotations

import importlib.util
import logging
import platform
import sys
from dataclasses import dataclass
from typing import Literal, Protocol

import psutil

from dormouse.domain.cache_spec import CacheSpec
from dormouse.domain.errors import ModelError
from dormouse.models.folder import ModelFolder
from dormouse.runtimes.base import Runtime
from dormouse.runtimes.context import Context
from dormouse.runtimes.fingerprint import DigestCache
from dormouse.settings import Settings

log = logging.getLogger(__name__)

RuntimeName = Literal["torch", "mlx"]

_DEFAULT_CONTEXTS = 32
_DEFAULT_MEMORY_SHARE = 0.25
_DIGESTS = "digests.json"


@dataclass(frozen=True, slots=True)
class Checked:
    """A model that a runtime can load, as far as that is known before it is loaded.

    Lengths are in tokens. `weights_nbytes` is what its weights will take in memory, `token_nbytes` what each
    token of the arena will.
    """

    cache: CacheSpec
    trained_length: int
    context_length: int
    weights_nbytes: int
    token_nbytes: float


class Backend(Protocol):
    """One runtime under the settings of a server. Both methods import it."""

    @property
    def name(self) -> RuntimeName:
        """What the loaded runtime will call itself."""

    def check(self, folder: ModelFolder) -> Checked:
        """Whether the runtime can load `folder`; no weights are read. Raises ModelError."""

    def load(self, folder: ModelFolder, arena_tokens: int) -> Runtime:
        """The model with an arena. Raises ModelError."""


def is_apple_silicon() -> bool:
    """Whether this is a machine that mlx was made for."""
    return sys.platform == "darwin" and platform.machine() == "arm64"


def is_installed(name: RuntimeName) -> bool:
    """Whether the library of that runtime is there; it is not imported."""
    return importlib.util.find_spec(name) is not None


def runtime_name(settings: Settings) -> RuntimeName:
    """What `--runtime` means on this machine."""
    if settings.runtime != "auto":
        return settings.runtime
    return "mlx" if is_apple_silicon() else "torch"


def choose(settings: Settings) -> Backend:
    """The runtime that the settings ask for.

    Raises ModelError when it is not installed, or has not what another setting asks of it.
    """
    name = runtime_name(settings)
    if not is_installed(name):
        raise ModelError(
            f"the {name} runtime is not installed here; run `pip install 'dormouse[{name}]'`, or choose "
            "another with --runtime"
        )
    return MlxBackend(settings) if name == "mlx" else TorchBackend(settings)


def load_runtime(settings: Settings, folder: ModelFolder) -> Runtime:
    """The model in a runtime, with an arena of `settings.arena_tokens` or a default that fits.

    Raises ModelError.
    """
    backend = choose(settings)
    checked = backend.check(folder)
    if checked.context_length > checked.trained_length:
        log.warning(
            "context of %d tokens by %s rope scaling with factor %g: the model was trained for %d; words "
            "become worse the further a context goes beyond that, and somewhat worse below, too",
            checked.context_length,
            settings.rope_scaling,
            settings.rope_factor or checked.context_length / checked.trained_length,
            checked.trained_length,
        )
    arena_tokens = settings.arena_tokens
    if arena_tokens is None:
        arena_tokens = default_arena(
            checked.cache.block_size, checked.token_nbytes, checked.context_length, checked.weights_nbytes
        )
    return backend.load(folder, arena_tokens)


def default_arena(block_size: int, token_nbytes: float, context_length: int, weights_nbytes: int) -> int:
    """Tokens that a share of the free memory holds: a full context at least, if it fits at all, and no more
    than many agents could use."""
    affordable = int((psutil.virtual_memory().available - weights_nbytes) / token_nbytes)
    # A page is kept back, see `EngineLoop.max_length`.
    full = context_length + block_size
    if affordable < full:
        log.warning(
            "the free memory holds %d tokens of KV, less than a context of %d; prompts are bounded by it",
            max(0, affordable),
            context_length,
        )
    share = max(int(affordable * _DEFAULT_MEMORY_SHARE), min(affordable, full))
    return max(2 * block_size, min(share, _DEFAULT_CONTEXTS * context_length))


class TorchBackend:
    """See `Backend`."""

    name: RuntimeName = "torch"

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def check(self, folder: ModelFolder) -> Checked:
        """See `Backend.check`: the config and the headers of the weight files are read."""
        from dormouse.runtimes.torch.preflight import check_folder

        config = check_folder(folder.path)
        _, context_length = _context(self._settings).fit(config)
        cache = CacheSpec.for_heads(
            self._settings.kv_format,
            self._settings.block_size,
            num_layers=len(config.layers),
            num_kv_heads=config.num_kv_heads,
            k_head_dim=config.head_dim,
            v_head_dim=config.head_dim,
        )
        return Checked(
            cache, config.context_length, context_length, folder.weights_nbytes, cache.token_nbytes
        )

    def load(self, folder: ModelFolder, arena_tokens: int) -> Runtime:
        """See `Backend.load`."""
        from dormouse.runtimes.torch.runtime import TorchRuntime

        settings = self._settings
        return TorchRuntime.load(
            folder.path,
            name=folder.name,
            kv_format=settings.kv_format,
            block_size=settings.block_size,
            arena_tokens=arena_tokens,
            device=settings.device,
            dtype=_dtype(settings),
            weights=settings.weights,
            context=_context(settings),
            threads=settings.threads,
            digests=_digests(settings),
        )


class MlxBackend:
    """See `Backend`."""

    name: RuntimeName = "mlx"

    def __init__(self, settings: Settings) -> None:
        """Raises ModelError when a setting asks for what only torch has."""
        if settings.device != "cpu":
            raise ModelError(
                f"--device {settings.device} is torch's; mlx computes on Metal where there is one, else on "
                "the CPU. Leave it out, or add --runtime torch"
            )
        if settings.weights in ("int8", "int4"):
            raise ModelError(
                f"--weights {settings.weights} is torch's; mlx takes the weights as they are in the folder. "
                "Name a model that is quantized for mlx (such as those of mlx-community), or add --runtime "
                "torch"
            )
        self._settings = settings

    def check(self, folder: ModelFolder) -> Checked:
        """See `Backend.check`: the model is built, its weights stay in their files."""
        try:
            from dormouse.runtimes.mlx.preflight import check_folder
        except ImportError as error:
            raise ModelError(
                f"mlx is installed but does not load ({error}); run `pip install --upgrade 'dormouse[mlx]'`"
            ) from error

        settings = self._settings
        found = check_folder(folder.path, dtype=_dtype(settings), context=_context(settings))
        cache = CacheSpec.for_heads(
            settings.kv_format,
            settings.block_size,
            num_layers=found.num_layers,
            num_kv_heads=found.shape.num_kv_heads,
            k_head_dim=found.shape.k_head_dim,
            v_head_dim=found.shape.v_head_dim,
        )
        # Beside their pages mlx holds the K and V of running sequences a second time, dense at worst.
        token_nbytes = cache.token_nbytes + found.dense_token_nbytes
        return Checked(cache, found.trained_length, found.context_length, found.weights_nbytes, token_nbytes)

    def load(self, folder: ModelFolder, arena_tokens: int) -> Runtime:
        """See `Backend.load`."""
        from dormouse.runtimes.mlx.runtime import MlxRuntime

        settings = self._settings
        return MlxRuntime.load(
            folder.path,
            name=folder.name,
            kv_format=settings.kv_format,
            block_size=settings.block_size,
            arena_tokens=arena_tokens,
            dtype=_dtype(settings),
            threads=settings.threads,
            digests=_digests(settings),
            context=_context(settings),
        )


def _context(settings: Settings) -> Context:
    return Context(settings.context_length, settings.rope_scaling, settings.rope_factor)


def _dtype(settings: Settings) -> str | None:
    return None if settings.dtype == "auto" else settings.dtype


def _digests(settings: Settings) -> DigestCache:
    return DigestCache(settings.models_dir / _DIGESTS)
