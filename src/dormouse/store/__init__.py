"""Durable blocks and agents: block files, the catalog that names them, and the threads that move them."""
