"""`python -m evaluation`: train, measure, compare, and make tables and plots."""

from evaluation.cli import app

if __name__ == "__main__":
    app(prog_name="python -m evaluation")
