"""Native kernels against torch, one JSON row each: `python -m benchmarks.kernels [--threads N]`.

Candidates take turns, so that a busy machine slows all of them; times are medians. GFLOP/s count only keys
that the causal mask lets through.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from dormouse.domain.cache_spec import CacheSpec, KVFormat
from dormouse.runtimes.torch import native
from dormouse.runtimes.torch.kernels import AttentionBatch
from dormouse.runtimes.torch.reference import ReferenceKernels

HEADS, KV_HEADS, DIM, BLOCK = 9, 3, 64, 128
Run = Callable[[], object]


def interleaved_medians(runs: dict[str, Run], rounds: int) -> dict[str, float]:
    """Seconds per call."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            begin = time.perf_counter()
            run()
            if turn:  # the first warms caches and threads
                times[name].append(time.perf_counter() - begin)
    return {name: statistics.median(values) for name, values in times.items()}


def attention(format: KVFormat, rows: int, keys: int, rounds: int) -> dict[str, Any]:
    """The last `rows` of `keys` tokens; SDPA reads plain bf16 K and V that are ready for it."""
    torch.manual_seed(0)
    spec = CacheSpec.for_heads(
        format, BLOCK, num_layers=1, num_kv_heads=KV_HEADS, k_head_dim=DIM, v_head_dim=DIM
    )
    num_pages = -(-keys // BLOCK)
    arena = torch.zeros((num_pages, spec.block_nbytes), dtype=torch.uint8)
    k, v = (torch.randn(keys, KV_HEADS, DIM).bfloat16() for _ in range(2))
    q = torch.randn(rows, HEADS, DIM).bfloat16()
    mine, reference = native.NativeKernels(spec), ReferenceKernels(spec)
    mine.write_kv(arena, 0, k, v, torch.arange(keys))
    batch = AttentionBatch(
        torch.tensor([0, rows], dtype=torch.int32),
        torch.tensor([keys - rows], dtype=torch.int32),
        torch.arange(num_pages, dtype=torch.int32)[None],
    )
    scale = DIM**-0.5
    wide_k, wide_v = (x.transpose(0, 1).repeat_interleave(HEADS // KV_HEADS, 0)[None] for x in (k, v))
    query = q.transpose(0, 1)[None].contiguous()
    mask = torch.ones(rows, keys, dtype=torch.bool).tril(keys - rows)
    seconds = interleaved_medians(
        {
            "native": lambda: mine.attend(arena, 0, q, batch, scale, None),
            "sdpa": lambda: scaled_dot_product_attention(query, wide_k, wide_v, attn_mask=mask, scale=scale),
            "reference": lambda: reference.attend(arena, 0, q, batch, scale, None),
        },
        rounds,
    )
    flops = 4 * DIM * HEADS * sum(range(keys - rows + 1, keys + 1))
    row = {"kernel": "attend", "format": format.value, "rows": rows, "keys": keys}
    return row | _figures(seconds) | {"native_gflops": round(flops / seconds["native"] / 1e9, 1)}


def writing(format: KVFormat, rows: int, rounds: int) -> dict[str, Any]:
    """Quantize and store `rows` tokens of one layer."""
    torch.manual_seed(0)
    spec = CacheSpec.for_heads(
        format, BLOCK, num_layers=1, num_kv_heads=KV_HEADS, k_head_dim=DIM, v_head_dim=DIM
    )
    arena = torch.zeros((-(-rows // BLOCK), spec.block_nbytes), dtype=torch.uint8)
    k, v = (torch.randn(rows, KV_HEADS, DIM).bfloat16() for _ in range(2))
    slots = torch.arange(rows)
    mine, reference = native.NativeKernels(spec), ReferenceKernels(spec)
    seconds = interleaved_medians(
        {
            "native": lambda: mine.write_kv(arena, 0, k, v, slots),
            "reference": lambda: reference.write_kv(arena, 0, k, v, slots),
        },
        rounds,
    )
    return {"kernel": "write_kv", "format": format.value, "rows": rows} | _figures(seconds)


def _figures(seconds: dict[str, float]) -> dict[str, Any]:
    figures = {f"{name}_us": round(value * 1e6, 1) for name, value in seconds.items()}
    return figures | {"isa": native.isa(), "threads": torch.get_num_threads()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    torch.set_num_threads(parser.parse_args().threads)
    rows = (
        *(attention(KVFormat.K8V4, 512, keys, 7) for keys in (512, 4096)),
        *(attention(each, 1, 4096, 40) for each in KVFormat),
        *(writing(KVFormat.K8V4, count, 40) for count in (1, 512)),
    )
    for row in rows:
        sys.stdout.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
