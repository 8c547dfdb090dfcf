"""What teaches a shell to complete metaalign-edge; `metaalign-edge completion SHELL` prints it."""
