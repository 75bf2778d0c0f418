"""Ring 1: the protocol, pure. It neither blocks, nor logs, nor tells the time."""
