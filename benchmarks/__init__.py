"""Time and memory, compared with a textbook reference in the same process: `python -m benchmarks.<name> --help`."""
