"""The rows of a running batch: what the engine asks of them, and the ways to compute them."""
