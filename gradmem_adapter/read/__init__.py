"""READ: answers from `[memory; query]`."""
