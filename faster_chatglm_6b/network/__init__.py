"""The network, from one block to the model with its head; it knows no generation."""
