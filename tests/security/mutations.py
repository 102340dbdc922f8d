"""What hypothesis does to good files and documents. `FUZZ=200` draws 200 times as many examples."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from copy import deepcopy
from typing import Any

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

_TIMES = int(os.environ.get("FUZZ", "1"))

INTERESTING = (
    0,
    1,
    2,
    7,
    0x7F,
    0xFF,
    0x7FFF,
    0xFFFF,
    0x7FFFFFFF,
    0xFFFFFFFF,
    1 << 40,
    (1 << 63) - 1,
    (1 << 64) - 1,
)
STRANGE: tuple[Any, ...] = (
    *(None, True, -1, 0, 1, 1 << 31, 1 << 40, 1 << 63, 10**400, -(10**400), 0.5, -0.0, 1e308, 1e-308),
    *("", "x", "\x00", "\u2028", "a" * 3000, "../../etc/passwd", "{{ 7 * 7 }}", "<end>", "\U0001f9ab"),
    *([], {}, [[]], [None], ["x", 1], {"": None}, {"type": "x"}, {"type": []}, [{}], [[[[1]]]]),
)


def fuzzing(num_examples: int) -> Callable[[Any], Any]:
    """The settings of a fuzz test: the same examples each time, more of them for `make fuzz`."""
    return settings(
        max_examples=num_examples * _TIMES,
        deadline=None,
        database=None,
        derandomize=_TIMES == 1,
        phases=[Phase.explicit, Phase.generate]
        if _TIMES == 1
        else [Phase.explicit, Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )


@st.composite
def damaged(draw: st.DrawFn, whole: bytes, hot: int | None = None) -> bytes:
    """`whole` with a few bytes changed, cut, doubled or put in; most of them among the first `hot`."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 6))):
        end = max(1, min(len(data), hot or len(data)) if draw(st.integers(0, 5)) else len(data))
        at = draw(st.integers(0, end - 1))
        match draw(st.sampled_from(("flip", "number", "cut", "insert", "remove", "double"))):
            case "flip" if data:
                data[at % len(data)] ^= draw(st.integers(1, 255))
            case "number":
                width = draw(st.sampled_from((1, 2, 4, 8)))
                value = draw(st.sampled_from(INTERESTING)) & ((1 << 8 * width) - 1)
                data[at : at + width] = value.to_bytes(width, "little")
            case "cut" if draw(st.integers(0, 3)) == 0:
                del data[at:]
            case "insert":
                data[at:at] = draw(st.binary(max_size=16))
            case "remove":
                del data[at : at + draw(st.integers(1, 16))]
            case "double":
                data[at:at] = data[at : at + draw(st.integers(1, 64))]
    return bytes(data)


@st.composite
def twisted(draw: st.DrawFn, document: Any) -> Any:
    """A copy of a JSON document with a few of its values exchanged, keys added, removed or moved."""
    copy = json.loads(json.dumps(document))
    root = [copy]
    for _ in range(draw(st.integers(1, 4))):
        places = list(_places(root))
        holder, key = draw(st.sampled_from(places))
        match draw(st.sampled_from(("strange", "remove", "extra", "wrap", "many"))):
            case "remove" if holder is not root:
                del holder[key]
            case "extra" if isinstance(holder, dict):
                holder[draw(st.text(max_size=6))] = deepcopy(draw(st.sampled_from(STRANGE)))
            case "wrap":
                holder[key] = draw(
                    st.sampled_from(([holder[key]], {"type": holder[key]}, {"x": holder[key]}))
                )
            case "many" if isinstance(holder[key], list):
                holder[key] = deepcopy(holder[key] * draw(st.integers(2, 40)))
            case _:
                holder[key] = deepcopy(draw(st.sampled_from(STRANGE)))
    return root[0]


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every holder and key below `value`."""
    found: list[tuple[Any, Any]] = []
    waiting = [value]
    while waiting:
        holder = waiting.pop()
        keys = list(holder) if isinstance(holder, dict) else range(len(holder))
        for key in keys:
            found.append((holder, key))
            if isinstance(holder[key], dict | list):
                waiting.append(holder[key])
    return found
