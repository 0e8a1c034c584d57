"""From a sweep's records to a decision: statistics, figures, report."""
