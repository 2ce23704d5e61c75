"""How fast ptender is, beside the tender that it stands in for: `python -m bench`."""
