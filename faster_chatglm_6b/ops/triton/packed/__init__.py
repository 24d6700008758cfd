"""Prompts of several sequences, packed one after the other without padding, whose keys and values go to pages."""
