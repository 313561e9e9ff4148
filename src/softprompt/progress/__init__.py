"""Progress on a terminal or in a notebook. No torch here."""
