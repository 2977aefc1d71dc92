"""Write questions for texts that have none: train a model to write questions with answers, and let it write."""
