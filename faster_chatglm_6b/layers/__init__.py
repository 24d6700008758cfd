"""The modules that blocks are made of."""
