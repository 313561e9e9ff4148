"""Learned parameters: the vectors, their starts, the forms they are trained in. Knows torch, and nothing of the base."""
