"""A prompt in the forms that other programs read."""
