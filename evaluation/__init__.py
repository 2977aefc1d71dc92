"""Everything that reproduces a number: tasks, methods, training recipes, results, and the tables and plots made of them."""
