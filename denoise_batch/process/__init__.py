"""This process: the cores and the memory that it may use, its environment variables, and the signals that end it."""
