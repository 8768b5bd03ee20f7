"""Where `interp.core.statistics` used to live."""

from interp.core.statistics import *  # noqa: F403
