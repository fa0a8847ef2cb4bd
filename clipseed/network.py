"""Whether the network is there, asked before anybody waits for it."""

from __future__ import annotations

import os
import socket

HUB = "huggingface.co"
_PROXIES = ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy", "HF_ENDPOINT")


def reachable(host: str, seconds: float = 3.0) -> bool:
    """Whether a TCP connection to the host's HTTPS port can be made; through a proxy, or to a mirror, nobody can say.

    ``HF_HUB_OFFLINE`` says no.
    """
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
        return False
    if any(os.environ.get(name) for name in _PROXIES):
        return True
    try:
        with socket.create_connection((host, 443), timeout=seconds):
            return True
    except OSError:
        return False
