"""Ring 5: processes and their life cycle."""
