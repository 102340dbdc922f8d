"""A model of mlx-lm, loaded from a folder, and what it is found to be."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import mlx.core as mx
import mlx.nn as nn
import psutil
from mlx.utils import tree_flatten

from dormouse.domain.errors import ModelError, UnsupportedModel
from dormouse.runtimes.decoder_config import DecoderConfig
from dormouse.runtimes.mlx import lm
from dormouse.runtimes.mlx.config import changes_for, refuse_unknown_quantization

MINIMUM = {"mlx": (0, 32), "mlx-lm": (0, 32)}
"""Before that streams belonged to no thread, and attention was called otherwise."""

T = TypeVar("T")

DTYPES = {"bf16": mx.bfloat16, "fp32": mx.float32}


@dataclass(frozen=True, slots=True)
class Loaded:
    """`windows` has an entry for each layer; None sees all."""

    module: nn.Module
    windows: tuple[int | None, ...]
    dtype: mx.Dtype

    @property
    def nbytes(self) -> int:
        """Bytes of weights."""
        return sum(array.nbytes for _, array in tree_flatten(self.module.parameters()))


def load_model(
    folder: Path,
    files: Sequence[Path],
    raw: Mapping[str, Any],
    config: DecoderConfig | None,
    dtype: str | None,
    *,
    lazy: bool = False,
) -> Loaded:
    """The model with its weights in memory, in `dtype` (`bf16`, `fp32`; None is what the device is good at).

    `config` is what `raw` means where that is known. With `lazy` the weights stay in their files, for a look
    at the model, and whether they fit is not asked. Raises UnsupportedModel, or ModelError when the packages
    are too old or the memory too small.
    """
    check_versions()
    refuse_unknown_quantization(raw)
    target = _dtype(dtype)
    if not lazy:
        check_memory(sum(file.stat().st_size for file in files), target, raw)
    changes = changes_for(raw, config) if config is not None else _plain_changes(raw)
    module: nn.Module = _foreign(lambda: lm.load_model(folder, lazy=lazy, model_config=changes)[0], folder)
    module.set_dtype(target)
    caches: list[object] = _foreign(lambda: lm.make_prompt_cache(module), folder)
    windows = tuple(_window(cache) for cache in caches)
    if config is not None:
        _compare_windows(windows, config)
    if not lazy:
        _settle(module)
    return Loaded(module, windows, target)


def check_versions() -> None:
    """Raises ModelError when mlx or mlx-lm is not installed or too old."""
    for package, least in MINIMUM.items():
        wanted = ".".join(map(str, least))
        try:
            found = version(package)
        except PackageNotFoundError as exc:
            raise ModelError(f"{package} is not installed; pip install 'dormouse[mlx]'") from exc
        if tuple(int(part) for part in found.split(".")[:2]) < least:
            raise ModelError(f"{package} {found} is too old; pip install -U '{package}>={wanted}'")


def check_memory(file_nbytes: int, dtype: mx.Dtype, raw: Mapping[str, Any]) -> None:
    """Raises ModelError when the weights would not fit, before any of them is read."""
    stored = str(raw.get("torch_dtype") or raw.get("dtype") or "")
    widened = dtype == mx.float32 and stored in ("bfloat16", "float16") and not raw.get("quantization")
    needed = file_nbytes * (2 if widened else 1)
    free = psutil.virtual_memory().available
    if needed > free:
        raise ModelError(
            f"the weights need {needed / 2**30:.1f} GiB and {free / 2**30:.1f} GiB are free; take a smaller "
            "model, or one with weights of 4 bits"
        )


def _plain_changes(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Where only mlx-lm knows the family: the base of the rope where those find it that look for it before
    transformers 5 put it elsewhere."""
    given = raw.get("rope_parameters")
    if isinstance(given, Mapping) and "rope_theta" in given and "rope_theta" not in raw:
        scaled = given.get("rope_type", "default") != "default"
        return {"rope_theta": given["rope_theta"], **({"rope_scaling": dict(given)} if scaled else {})}
    return {}


def _dtype(name: str | None) -> mx.Dtype:
    """fp32 on a CPU: products of bf16 have no fast kernel there."""
    if name is None:
        name = "fp32" if mx.default_device().type == mx.DeviceType.cpu else "bf16"
    if name not in DTYPES:
        raise ModelError(f"dtype {name!r} is not known; use {' or '.join(DTYPES)}")
    return DTYPES[name]


def _foreign(load: Callable[[], T], folder: Path) -> T:
    """What mlx-lm's code gives; whatever it raises means that it does not have this model."""
    try:
        return load()
    except Exception as exc:
        raise UnsupportedModel(f"mlx-lm cannot load {folder.name}: {exc}") from exc


def _window(cache: object) -> int | None:
    """The window of a layer with such a cache. Raises UnsupportedModel for state that is no K and V."""
    if type(cache) is lm.KVCache:
        return None
    if type(cache) is lm.RotatingKVCache and not cache.keep:
        return int(cache.max_size)
    raise UnsupportedModel(
        f"the model keeps {type(cache).__name__}; only the K and V of attention can sleep, with or without "
        "a sliding window"
    )


def _compare_windows(windows: tuple[int | None, ...], config: DecoderConfig) -> None:
    expected = tuple(layer.window for layer in config.layers)
    if windows == expected:
        return
    differing = [
        index for index, pair in enumerate(zip(windows, expected, strict=False)) if len(set(pair)) > 1
    ]
    raise UnsupportedModel(
        f"by config.json layers {differing} have other sliding windows than mlx-lm gives them, or there are "
        f"other than {len(windows)} layers"
    )


def _settle(module: nn.Module) -> None:
    """Compute all that was only described: frequencies of ropes, say, which are no parameters.

    What is described belongs to the stream of this thread, and another one will use the model.
    """
    for part in module.modules():
        mx.eval([value for value in part.values() if isinstance(value, mx.array)])
