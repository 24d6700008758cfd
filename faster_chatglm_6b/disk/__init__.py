"""Read and replace files on disk; knows no model."""
