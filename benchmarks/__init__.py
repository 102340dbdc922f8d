"""Measurements over HTTP, as a user would see them."""
