"""Past one process: a gateway before several engines, and engines of others."""
