"""The torch runtime."""

import os

# Read by libgomp when torch loads it, so it stands here, before any import of torch. A worker that waits at
# a barrier spins; by default for so long that on cores shared with other programs it burns the time that
# the worker it waits for would need. Measured on two cores: a decode step took 960 ms instead of 20 beside
# two busy processes, and 97 ms with this count; alone the two are equally fast.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
