"""What a terminal shows, and what it reads."""
