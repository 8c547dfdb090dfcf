"""What `eval`, `bench` and `doctor` measure, and a model's trial in a child process."""
