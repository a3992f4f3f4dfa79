"""Whether the hub of models can be reached: asked once, for its client tries for half a minute a file, even where models are cached."""

import functools
import socket
import urllib.request
from urllib.parse import urlsplit

from huggingface_hub import constants

SECONDS = 5.0  # for a connection


@functools.cache
def go_offline_if_unreachable() -> None:
    """Lets Hugging Face's libraries look in their cache alone from here on, where nobody answers at the hub's address.

    Behind a proxy nothing is asked: the hub may be reached through it alone.
    """
    if not constants.HF_HUB_OFFLINE and not urllib.request.getproxies() and not reachable(constants.ENDPOINT):
        constants.HF_HUB_OFFLINE = True


def reachable(url: str) -> bool:
    at = urlsplit(url)
    try:
        socket.create_connection((at.hostname or "", at.port or (80 if at.scheme == "http" else 443)), SECONDS).close()
    except OSError:
        return False
    return True
