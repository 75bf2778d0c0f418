"""Ring 4: what the operator sees: configuration, logs, counters, metrics."""
