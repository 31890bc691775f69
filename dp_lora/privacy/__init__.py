"""The private mechanism: knows tensors and a per-example loss, never diffusers nor the configuration.

`step` is the algorithm. Its parts, in its order: `plan` fixes the numbers, `batches` draws the examples,
`gradients` clips and sums what `layers` hand over, `mechanism` adds the noise, `accounting` says what was
spent; `randomness` is behind them all, and `executions` keeps the record.
"""
