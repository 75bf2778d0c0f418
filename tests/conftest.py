"""Settings for all tests."""

import resource

from hypothesis import settings

# How long an example takes says something about the machine, and nothing about the behaviour.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

# Crowds of 500 are here with both of their ends, which the usual soft limit of 1,024 just allows.
_soft, _hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (max(_soft, min(_hard, 4096)), _hard))
