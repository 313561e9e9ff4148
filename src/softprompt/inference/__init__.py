"""What the base says under a prompt: compiled prompts, running batches, generation and scores."""
