"""What the server answers at all: ASGI middleware in front of Gradio.

Only the studio's own pages are answered (on the loopback address under local names alone, so that no web page can
reach it through a name of its own: DNS rebinding); uploads are limited and what is left of them is cleaned; a wrong
password makes the next one wait.
"""

from __future__ import annotations

import contextlib
import ipaddress
import shutil
import time
from pathlib import Path
from urllib.parse import urlsplit

from lab.studio.places import MAX_UPLOAD_BYTES

MOST_WAITING_BYTES = 10 * MAX_UPLOAD_BYTES  # of everything in the upload folder
FORM_BYTES = 1 << 16  # that a form adds to the file in it
UPLOAD_AGE_S = 3600.0  # a page has long taken what it uploaded; older files are deleted
LONGEST_WAIT_S = 60.0
MOST_CLIENTS = 1000  # whose wrong passwords are remembered
# Everything comes from this server; Gradio's front end writes scripts and styles into the page itself.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; object-src 'none'; "
    "base-uri 'self'; form-action 'self'; frame-ancestors 'self'"
)
_EXTRA_HEADERS = (
    (b"content-security-policy", POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"same-origin"),
)


def is_loopback(host: str) -> bool:
    """Whether `host` is reachable from this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def origin_refusal(method: str, headers: dict[str, str], local_only: bool) -> str:
    """Why a request is not answered for where it comes from, or ''. `headers` by their names in small letters.

    A browser names the page that sends a request in Origin, and in Sec-Fetch-Site how it stands to the address asked;
    programs send neither. Following a link from elsewhere is all that a foreign page may do."""
    host = headers.get("host", "").lower()
    name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
    if local_only and not is_loopback(name):
        return "the studio answers to local names only"
    origin = headers.get("origin")
    if origin is not None and urlsplit(origin).netloc.lower() != host:
        return f"the studio answers its own pages only, not {origin[:80]!r}"
    follows_link = method in ("GET", "HEAD") and headers.get("sec-fetch-mode") == "navigate"
    if headers.get("sec-fetch-site") in ("cross-site", "same-site") and not follows_link:
        return "the studio answers its own pages only, not those of another site"
    return ""


def clean_uploads(folder: Path, older_than_s: float = UPLOAD_AGE_S) -> int:
    """Delete what lies in the upload folder longer than that; returns the bytes that are left."""
    limit, left = time.time() - older_than_s, 0
    for entry in folder.iterdir() if folder.is_dir() else ():
        with contextlib.suppress(OSError):  # another request may be cleaning too
            files = [f for f in (entry.rglob("*") if entry.is_dir() else (entry,)) if f.is_file()]
            if max((f.stat().st_mtime for f in files), default=entry.stat().st_mtime) >= limit:
                left += sum(f.stat().st_size for f in files)
            elif entry.is_dir():
                shutil.rmtree(entry, ignore_errors=True)
            else:
                entry.unlink(missing_ok=True)
    return left


def upload_refusal(headers: dict[str, str], folder: Path) -> tuple[int, str]:
    """(status, why) an upload is not taken; (0, '') if it is. Old ones are cleaned first."""
    size = headers.get("content-length", "")
    if not size.isdigit():
        return 411, "an upload says how long it is"
    if int(size) > MAX_UPLOAD_BYTES + FORM_BYTES:
        return 413, f"at most {MAX_UPLOAD_BYTES >> 20} MB can be uploaded"
    if clean_uploads(folder) + int(size) > MOST_WAITING_BYTES:
        return 507, f"{folder} is full of uploads; they are deleted an hour after they came"
    return 0, ""


class Doorkeeper:
    """Makes guessing slow: after the n-th wrong password in a row a client waits 2^(n-1) seconds, a minute at most."""

    def __init__(self, clock=time.monotonic):
        self.clock = clock
        self.wrong: dict[str, tuple[int, float]] = {}  # client: (wrong passwords, time of the next try)

    def wait_s(self, client: str) -> float:
        """Seconds until the next try; 0 now, and then the try counts as wrong until `right` is called (several sent
        at once must not all go through)."""
        count, until = self.wrong.get(client, (0, 0.0))
        if (left := until - self.clock()) > 0:
            return left
        if client not in self.wrong and len(self.wrong) >= MOST_CLIENTS:
            del self.wrong[min(self.wrong, key=lambda one: self.wrong[one][1])]
        self.wrong[client] = (count + 1, self.clock() + min(LONGEST_WAIT_S, 2.0**count))
        return 0.0

    def right(self, client: str) -> None:
        """The password was the right one."""
        self.wrong.pop(client, None)


class Guard:
    """The middleware: see the top of this file."""

    def __init__(self, app, local_only: bool, uploads: Path):
        self.app, self.local_only, self.uploads = app, local_only, uploads
        self.door = Doorkeeper()

    async def __call__(self, scope, receive, send):
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        method, path = scope.get("method", "GET"), scope["path"].rstrip("/")
        client = (scope.get("client") or ("",))[0]
        if why := origin_refusal(method, headers, self.local_only):
            await _answer(scope, send, 403, why)
            return
        login = method == "POST" and path.endswith("/login")
        if method == "POST" and path.endswith("/upload"):
            status, why = upload_refusal(headers, self.uploads)
            if status:
                await _answer(scope, send, status, why)
                return
        if login and (wait := self.door.wait_s(client)):
            seconds = int(wait) + 1
            await _answer(scope, send, 429, f"wrong password; try again in {seconds} s", retry=seconds)
            return

        async def send_with_policy(message):
            if message["type"] == "http.response.start":
                if login and message["status"] == 200:
                    self.door.right(client)
                message = {**message, "headers": [*message["headers"], *_EXTRA_HEADERS]}
            await send(message)

        await self.app(scope, receive, send_with_policy)


async def _answer(scope, send, status: int, text: str, retry: int = 0) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})
        return
    headers = [(b"content-type", b"text/plain; charset=utf-8"), *_EXTRA_HEADERS]
    if retry:
        headers.append((b"retry-after", str(retry).encode()))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": f"{text}\n".encode()})
