"""Define the network, from one block to the model with its head, without knowing generation."""
