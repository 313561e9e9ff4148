"""Kernels of the fast loss on a CPU: the head, linear layers, attention and activations."""
