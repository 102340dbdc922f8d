"""`make report`: pages and charts from the rows of real runs. With `--junit FILE` that run of the tests
becomes a row first, with `--coverage FILE` what it covered."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.compare import page
from benchmarks.soak.page import IMAGES, write_charts

from docs import generate, measured, test_runs
from docs.measured import NotRun


def main() -> int:
    """Write all of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--junit", type=Path, help="what `make test ARGS=--junitxml=FILE` wrote")
    parser.add_argument("--coverage", type=Path, help="what `make coverage` wrote to build/coverage.json")
    options = parser.parse_args()
    if options.junit:
        test_runs.keep(options.junit)
    if options.coverage:
        test_runs.keep_coverage(options.coverage)
    if page.load(page.ROWS):
        page.write(page.ROWS)
    try:
        write_charts(measured.document("soak"), generate.HERE / IMAGES)
    except NotRun as error:
        sys.stderr.write(f"no charts of a soak: {error} is not there\n")
    return generate.write()


if __name__ == "__main__":
    sys.exit(main())
