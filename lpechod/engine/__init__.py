"""Ring 2: the mechanism (clock, timer wheel, pollers, loop, buffers), ignorant of frames."""
