"""Measurements that any user can repeat. Each returns plain numbers; `dormouse bench` prints them."""
