"""The fast path: engine.c (hypercalls) and ring.c (the network ring), and their Python side."""
