"""What is said about a run: its files, its tracker, its card, and what of them may leave."""
