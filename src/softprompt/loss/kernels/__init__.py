"""What the fast loss is made of: the head, linear layers, attention and activations on a CPU."""
