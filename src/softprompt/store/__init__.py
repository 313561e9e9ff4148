"""Storage of prompts: on disk in PEFT's format, in a library, on the hub."""
