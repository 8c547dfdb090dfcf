"""What lies on disk, each kind in a file of its own."""
