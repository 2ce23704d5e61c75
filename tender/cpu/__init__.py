"""CPUs: their exits and state as values, and the CPUs in software."""
