"""What the attacks share with the other tests."""

import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]
sys.path.extend(str(folder) for folder in (TESTS, TESTS / "cli", TESTS / "integrations" / "langchain"))
