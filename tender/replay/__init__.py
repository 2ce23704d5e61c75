"""Recording a run of the software CPU, and running it once more (docs/guide-replay.md)."""
