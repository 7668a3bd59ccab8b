"""What the lessons are made with: predictions, comparisons, checks, solutions, and the notebooks' rules and store."""
