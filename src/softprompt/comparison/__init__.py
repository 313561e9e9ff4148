"""Prompt tuning against its alternatives: the same data, the same budget, costs measured."""
