"""The products with an integer weight and 2 to 8 rows of x."""
