"""Learning a prompt: the recipe, the loop, the optimisers, checkpoints."""
