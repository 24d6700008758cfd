"""Serve many users at once: rows of a running batch, the engine that owns the model, and OpenAI's HTTP interface."""
