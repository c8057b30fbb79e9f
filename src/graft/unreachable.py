"""Judges that do not answer are said at the start of a run, not after the first samples have waited for them."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from graft.config import Judge

CONNECT_SECONDS = 5.0


def unreachable_judges(settings: Judge, models: Sequence[str]) -> list[str]:
    """A line for every server of these models that takes no connection now.

    No question is asked, so that nothing is paid. A server behind a proxy is not tried, and one that is down may be up
    when it is needed, or never be needed since its answers are kept on disk: hence lines, no error.
    """
    servers: dict[str, list[str]] = {}
    for model in models:
        own = settings.models.get(model)
        servers.setdefault((own and own.base_url) or settings.base_url, []).append(model)
    lines = []
    for url, asked in servers.items():
        problem = _problem(url)
        if problem is not None:
            lines.append(
                f"the judge {' and '.join(dict.fromkeys(asked))} at {url} takes no connection now ({problem}): "
                "start it, or mend grading.judge.base_url; each question is tried grading.judge.retries times more "
                "before it fails"
            )
    return lines


def _problem(url: str) -> str | None:
    """Why a server takes no connection; None where it does, or where a proxy stands between."""
    parts = urlsplit(url)
    try:
        host, port = parts.hostname or "", parts.port or {"http": 80}.get(parts.scheme, 443)
        if parts.scheme in getproxies() and not proxy_bypass(host):
            return None
        socket.create_connection((host, port), timeout=CONNECT_SECONDS).close()
    except (OSError, ValueError) as error:  # a port that is no number
        return str(error)
    return None
