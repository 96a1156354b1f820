"""All that knows Ray: where runs are placed, how they are started, in which order."""
