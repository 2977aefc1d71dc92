"""The demonstrations of `gradmem demo`, one per file."""
