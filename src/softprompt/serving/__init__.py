"""Many prompts by name from one base: an engine that owns the model, and an OpenAI-compatible server in front of it."""
