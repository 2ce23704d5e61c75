"""Looking at a guest: traces and core files."""
