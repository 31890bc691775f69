"""The class that Hydra looks up for `hydra/launcher=slurm` and `hydra/launcher=local`.

Hydra imports the modules of this package at every start of the command; the work is in `sweeps.cluster`.
"""
