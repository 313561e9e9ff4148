"""What a terminal or a notebook shows while something runs. No torch here."""
