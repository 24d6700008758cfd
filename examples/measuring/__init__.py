"""What ``examples/benchmark.py`` is made of, and the programs that found the kernels' block shapes."""
