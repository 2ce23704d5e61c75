"""A guest that is saved, and goes on from there."""
