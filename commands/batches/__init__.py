"""What `batch` is made of."""
