"""The records of a run: its files, its tracker, its card, and the parts of them that may leave."""
