"""What things cost, each beside a textbook reference in the same process: `python -m benchmarks.<name> --help`."""
