"""What several tests need: models and checkpoints to try, a hub, a terminal."""
