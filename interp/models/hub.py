"""Whether the hub can be reached: asked once, so that no library tries again for half a minute."""

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError

NOT_HERE = 500
"""From this status on the server is at fault, not the question."""


def hub_answers(name: str, revision: str = "main") -> bool:
    """Ask the hub once about a model; False where only the cache can help.

    Any answer counts, "there is no such model" too: the libraries make a sentence of that.

    Example:
        >>> isinstance(hub_answers("org/model"), bool)
        True
    """
    if constants.is_offline_mode():
        return False
    try:
        get_hf_file_metadata(hf_hub_url(name, "config.json", revision=revision))
    except HfHubHTTPError as error:
        return getattr(error.response, "status_code", 0) < NOT_HERE
    except Exception:  # no network, no name service, a proxy: the kind depends on the library's version
        return False
    return True
