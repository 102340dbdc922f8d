"""These tests need the extra `mlx`; where it is not installed they are not collected."""

import importlib.util

if importlib.util.find_spec("mlx") is None:
    collect_ignore_glob = ["test_*.py"]
