"""`hydra/sweeper=grid`: the jobs of a sweep as a product, or as cells; Hydra imports it at every start."""
