"""Guests of a program: their processes, devices and consoles."""
