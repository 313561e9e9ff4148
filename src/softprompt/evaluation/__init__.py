"""Measuring a prompt: metrics with their error, and every row kept."""
