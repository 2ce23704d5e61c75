"""The fast path: engine.c, its Python side, and the network ring."""
