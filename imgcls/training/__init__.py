"""From a run's request to its result, in one process or as one rank of many."""
