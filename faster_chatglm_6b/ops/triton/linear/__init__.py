"""Products with float weights."""
