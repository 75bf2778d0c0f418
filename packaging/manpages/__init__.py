"""The manual pages, made from what the code says of itself: parser, models, metrics, reasons.

Whatever has no text in the code has it here, once. A command, a status, a kind of value or a reason
that nobody has explained ends the build.
"""
