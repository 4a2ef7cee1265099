"""Settings of all property tests."""

from hypothesis import settings

# the machine is shared, and how long one example takes says nothing of the code
settings.register_profile("shared machine", deadline=None)
settings.load_profile("shared machine")
