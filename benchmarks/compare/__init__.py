"""Dormouse and its peers, driven alike over HTTP: `make peers`, then `make compare`."""
