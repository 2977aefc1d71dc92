"""What memory is trained and measured on: one file per task, with its data, prompt format and metric."""
