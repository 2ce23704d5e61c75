"""Guests for Solo5's spt target: the tender's process becomes the guest."""
