"""Unikernels as OCI containers."""
