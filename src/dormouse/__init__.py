"""Dormouse: a local inference server whose agents sleep on disk and wake in milliseconds."""

__version__ = "0.1.0"
