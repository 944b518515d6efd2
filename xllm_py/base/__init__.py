"""Floor 0: errors, ids, clock, hashing, log, tasks, metrics. Imports nothing of ours."""
