"""What a running tender may ask of the kernel, as data: tender/rules.py says how it is read."""
