"""The private mechanism: knows tensors and a per-example loss, never diffusers nor the configuration.

In the order of the algorithm: `plan` fixes the numbers, `batches` draws the examples, `gradients` clips
and sums what `layers` hand over, `mechanism` adds the noise, `accounting` says what was spent; `randomness`
is behind them all.
"""
