"""The command line: parse, call, print. One file a verb; app.py lists them, ending.py ends them."""
