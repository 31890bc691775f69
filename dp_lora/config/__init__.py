"""The settings of a job: the schema, its checks, and the identity of a run."""
