"""What `metaalign-edge help TOPIC` prints: a page a topic, in Markdown."""
