"""Moving a job: strategies, integrity, shared memory, checkpoints. Imports no torch."""
