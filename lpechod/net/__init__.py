"""Ring 3: sockets. It joins the pure protocol to the loop."""
