"""How good a prompt is: metrics with their error, and every row kept."""
