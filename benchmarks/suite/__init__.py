"""Benchmarks in the form of tests, on the embedded model, one server a module: `make bench-suite`.

They assert what is true on every machine: counts, bytes, words, and ratios far from what was measured. The
figures are in the rows that `--record` keeps.
"""
