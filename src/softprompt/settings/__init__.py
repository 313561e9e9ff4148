"""Tables of settings: declared once, read from YAML, flags and Python. No torch here."""
