"""One job, from a checked configuration to the files of its run, and what it is charged."""
