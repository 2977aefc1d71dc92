"""Files, fingerprints, hardware: what any part of the package may use."""
