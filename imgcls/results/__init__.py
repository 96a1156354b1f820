"""From the records of runs to five answers on one page."""
