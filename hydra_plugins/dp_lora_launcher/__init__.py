"""`hydra/launcher=slurm` and `hydra/launcher=local`: the jobs of a sweep on a cluster or on this machine.

| module | what |
|---|---|
| `config` | the settings under `hydra.launcher` |
| `_cells` | the jobs of a sweep, composed and checked before anything is submitted |
| `_ledger` | the sweep's folder: its lock, its frozen configurations, what was submitted |
| `_slurm`, `_pool` | where jobs run: arrays of SLURM, or a bounded pool of processes |
| `_node` | what a job does where it runs |
| `launcher` | the driver: plan, submit, watch, report |

Hydra imports the modules of this package at every start of the command, but those with an underscore: they
are imported when a sweep needs them.
"""
