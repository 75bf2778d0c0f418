"""Settings for all tests."""

from hypothesis import settings

# How long an example takes says something about the machine, and nothing about the behaviour.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
