"""The jobs of a sweep, on a cluster or on this machine.

| module | what |
|---|---|
| `settings` | what can be asked under `hydra.launcher` |
| `cells` | the jobs of a sweep, composed and checked before anything is submitted |
| `ledger` | the sweep's folder: its lock, its frozen configurations, what was submitted |
| `slurm`, `pool` | where jobs run: arrays of SLURM, or a bounded pool of processes |
| `node` | what a job does where it runs |
| `drive` | the driver: plan, submit, watch, report |
"""
