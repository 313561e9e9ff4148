"""The loss, faster: equal to the base's own up to rounding, with its gradient at the prompt."""
