"""Attacks on a run: canaries, membership inference, tests of the noise."""
