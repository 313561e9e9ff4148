"""What is frozen: the language model, where a prompt stands in its input, the loss, and key/value state."""
