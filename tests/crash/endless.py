"""A store that saves growing agents until it is killed, saying what is durable: `name=num_tokens`.

python -m tests.crash.endless FOLDER
"""

from __future__ import annotations

import sys
from itertools import count
from pathlib import Path

from tests.store.kit import CACHE, NAMESPACE, QUOTA, links_of, put_all, save

from dormouse.store.block_store import BlockStore


def main(folder: Path) -> None:
    """Never returns."""
    store = BlockStore.open(folder, quota_nbytes=QUOTA)
    store.register(NAMESPACE, CACHE)
    for number in count(1):
        name = f"agent{number % 3}"
        links = links_of(range(number * 5))
        put_all(store, links)
        assert save(store, name, links)
        sys.stdout.write(f"{name}={number * 5}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
