"""Inference under prompts: compiled prompts, running batches, generation and scores."""
