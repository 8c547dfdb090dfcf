"""The rows of the command `batch`, and the work of answering them."""
