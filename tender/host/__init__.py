"""The host's side of a guest's devices: taps, passt, streams, overlays, remote disks."""
