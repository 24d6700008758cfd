"""Read the arguments of transformers' ``generate()``, choose the path that serves them, and run the plain one."""
