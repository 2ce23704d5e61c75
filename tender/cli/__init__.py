"""The commands: the command line, and the tools beside running a guest."""
