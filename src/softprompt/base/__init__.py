"""The frozen language model: placing a prompt in its input, the exact loss, and key/value state."""
