"""Ablations: reads the run directories that jobs leave, and turns them into tables."""
