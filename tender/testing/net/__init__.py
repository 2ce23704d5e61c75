"""The network of a test: a switch, its ports, hosts and packets."""
