"""JSON over HTTP to a vLLM server: retries, time limits, and one clear message per way to fail."""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from typing import Any

from mmpost.core.errors import MmpostError

TRIES = 4
# A server that restarts or is overloaded; every request of ours may be sent again except weight updates.
PASSING = (500, 502, 503, 504)
START = "Start it as docs/rollouts.md says"


class NotServed(Exception):
    """The server does not know the path (404)."""


class Client:
    """Talks to one server.

    Attributes:
        url: ``http://host:port``.
    """

    def __init__(self, url: str, *, timeout: float, pause_s: float = 0.5) -> None:
        """Make a client; nothing is sent.

        Args:
            url: ``http://host:port``.
            timeout: Seconds for one request.
            pause_s: Seconds before the second try, doubled before each further one.
        """
        self.url, self.timeout, self.pause_s = url, timeout, pause_s
        # Engines stand on the local machine or in the same cluster, which the proxies of the environment do not reach.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def wait(self, seconds: float) -> None:
        """Wait until the server is up.

        Raises:
            MmpostError: MMP-E060 when it is not up after ``seconds``.
        """
        end = time.monotonic() + seconds
        while True:
            try:
                self._send("/health", None, min(self.timeout, 10.0))
            except (OSError, http.client.HTTPException) as error:
                if time.monotonic() >= end:
                    raise self._gone(error, f" after {seconds:g} s") from error
                time.sleep(min(1.0, self.pause_s))
            else:
                return

    def get(self, path: str) -> Any:
        """Answer to a GET."""
        return self._request(path, None, tries=TRIES)

    def post(self, path: str, body: dict[str, Any], *, again: bool = True) -> Any:
        """Answer to a POST.

        Args:
            path: With a leading slash.
            body: Sent as JSON.
            again: Whether the request may be repeated after a passing fault.

        Raises:
            NotServed: The server does not know ``path``.
            MmpostError: MMP-E060 no connection, MMP-E061 too slow, MMP-E063 refused.
        """
        return self._request(path, body, tries=TRIES if again else 1)

    def _request(self, path: str, body: dict[str, Any] | None, *, tries: int) -> Any:
        for attempt in range(1, tries + 1):
            try:
                return self._send(path, body, self.timeout)
            except urllib.error.HTTPError as error:
                if error.code == 404:
                    raise NotServed(path) from error
                if error.code not in PASSING or attempt == tries:
                    raise self._refused(path, error) from error
            except TimeoutError as error:
                raise self._slow(path) from error
            except (urllib.error.URLError, http.client.HTTPException, ConnectionError) as error:
                if isinstance(getattr(error, "reason", None), TimeoutError):
                    raise self._slow(path) from error
                if attempt == tries:
                    raise self._gone(error, f" in {tries} tries" if tries > 1 else "") from error
            time.sleep(self.pause_s * 2 ** (attempt - 1))
        raise AssertionError("unreachable")

    def _send(self, path: str, body: dict[str, Any] | None, timeout: float) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        with self._opener.open(request, timeout=timeout) as answer:
            text = answer.read()
        try:
            return json.loads(text) if text.strip() else {}
        except ValueError as error:
            raise MmpostError(
                "MMP-E063", f"{self.url}{path} answered with something that is no JSON.", f"{START}."
            ) from error

    def _gone(self, error: BaseException, when: str) -> MmpostError:
        why = getattr(error, "reason", None) or error
        return MmpostError(
            "MMP-E060",
            f"no vLLM server answers at {self.url}{when}: {why}.",
            f"{START}, or set rollout.vllm.host and rollout.vllm.port.",
        )

    def _slow(self, path: str) -> MmpostError:
        return MmpostError(
            "MMP-E061",
            f"{self.url}{path} gave no answer within {self.timeout:g} s.",
            "Raise rollout.vllm.timeout, or lower rollout.vllm.concurrency.",
        )

    def _refused(self, path: str, error: urllib.error.HTTPError) -> MmpostError:
        said = _said(error.read().decode(errors="replace"))
        return MmpostError("MMP-E063", f"{self.url}{path} answered {error.code}: {said}", f"{START}.")


def _said(text: str) -> str:
    """The message inside an error answer, on one line of at most 300 characters."""
    try:
        found = json.loads(text)
    except ValueError:
        found = text
    for key in ("error", "message", "detail"):
        if isinstance(found, dict) and key in found:
            found = found[key]
    line = " ".join(str(found).split())
    return line if len(line) <= 300 else f"{line[:297]}..."
