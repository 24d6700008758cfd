"""transformers' ``generate()``: read its arguments, choose the path that serves them, run the plain one."""
