"""The command line: `main.py` is the parser only; one file per noun."""
