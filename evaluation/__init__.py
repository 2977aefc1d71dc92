"""Everything that reproduces a number: tasks, methods, recipes, results, and the tables and plots made of them."""
