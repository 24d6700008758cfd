"""The parts that the network's blocks are made of."""
