"""Questions on texts that have none: a model is trained to write them with their answers, and writes them."""
