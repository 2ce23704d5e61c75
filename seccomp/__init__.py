"""What a running tender may ask of the kernel; tender/sandbox/policy.py reads it."""
