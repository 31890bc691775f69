"""Ablations: from the words of a sweep to its jobs, tables, plots and page.

| module | what |
|---|---|
| `folders` | which sweeps and runs lie in a folder |
| `collect` | their runs as tidy rows; what cannot be compared |
| `summary` | runs over seeds as settings: means, deviations, what the settings differ in |
| `published` | figures of papers to stand beside, from `published.csv` |
| `tables`, `curves`, `figures`, `page` | tables; values over steps; plots; the page |
| `bill` | what all runs on a private set spend together |
| `report`, `dashboard` | all of these as files; a W&B workspace |
| `plan`, `status`, `cancel` | what a sweep will take and spend; what it does; its end |
| `grid` | the jobs of a sweep that is no product |
| `cluster` | its jobs, on SLURM or on this machine |

`python -m sweeps` is the command; imports point from the bottom of this list to its top.
"""
