"""How a prompt learns: the recipe, the loop, the optimisers, checkpoints."""
