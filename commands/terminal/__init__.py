"""Reading from a terminal, and printing to one or to a pipe."""
