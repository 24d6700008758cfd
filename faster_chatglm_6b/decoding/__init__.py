"""Serve a ``Request`` token by token in the captured loop, without knowing transformers."""
