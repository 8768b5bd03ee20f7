"""Untrained models wide enough for what the width limit promises."""

import copy

import pytest


@pytest.fixture(scope="session")
def wide(tiny):
    """The tiny architectures at a width of 192, as they are initialized; made when asked for."""
    made = {}

    def of(architecture):
        if architecture not in made:
            hf = tiny(architecture)
            config = copy.deepcopy(hf.config)
            config.get_text_config().hidden_size = 192
            made[architecture] = type(hf)(config).eval()
        return made[architecture]

    return of
