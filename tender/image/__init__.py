"""Images: read, checked, loaded, built."""
