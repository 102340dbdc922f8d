"""`python -m dormouse`."""

from dormouse.cli.main import app

app()
