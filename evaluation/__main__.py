"""`python -m evaluation`: train, measure, compare, and make tables and plots."""

if __name__ == "__main__":
    try:
        from evaluation.cli import app

        app(prog_name="python -m evaluation")
    except KeyboardInterrupt:  # during imports, which take seconds; later ones are handled by Typer
        raise SystemExit(130) from None
