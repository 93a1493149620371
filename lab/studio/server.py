"""Start the studio's web server, on this machine only unless told otherwise.

It listens on the loopback address. Another --host is served only with a password (of 8 characters or more), read
from the environment variable STUDIO_PASSWORD or typed at the terminal; the user's name is `studio`. Connections
are not encrypted: between machines, an SSH tunnel to the loopback address is the better way.

Exit codes: 0 ended by Ctrl-C, 2 usage, 5 the port or the folder cannot be used.
"""

from __future__ import annotations

import argparse
import contextlib
import getpass
import inspect
import ipaddress
import os
import sys
import threading
from collections.abc import Iterator, Sequence

from lab.studio.places import MAX_UPLOAD_BYTES, Places, Refused

USER, PASSWORD_VARIABLE, SHORTEST_PASSWORD = "studio", "STUDIO_PASSWORD", 8
FIRST_PORT = 7860
# Everything comes from this server; Gradio's front end writes scripts and styles into the page itself.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; object-src 'none'; "
    "base-uri 'self'; form-action 'self'; frame-ancestors 'self'"
)


def is_loopback(host: str) -> bool:
    """Whether `host` is reachable from this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def password_for(host: str) -> str | None:
    """None on the loopback address without STUDIO_PASSWORD; else the password. Refused without a good one."""
    password = os.environ.get(PASSWORD_VARIABLE, "")
    if is_loopback(host) and not password:
        return None
    if not password and sys.stdin is not None and sys.stdin.isatty():
        password = getpass.getpass(f"Password for the studio on {host}: ")
    if len(password) < SHORTEST_PASSWORD:
        raise Refused(
            f"--host={host} is reachable from other machines, so the studio needs a password of at least "
            f"{SHORTEST_PASSWORD} characters in {PASSWORD_VARIABLE}; or leave --host out"
        )
    return password


class Guard:
    """ASGI middleware. On the loopback address only local names are answered, so that no web page elsewhere can
    reach the studio through a name of its own (DNS rebinding); and the browser is told to load nothing from
    outside."""

    def __init__(self, app, local_only: bool):
        self.app, self.local_only = app, local_only

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        host = dict(scope["headers"]).get(b"host", b"").decode("latin-1")
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
        if self.local_only and not is_loopback(name):
            await send({"type": "http.response.start", "status": 403, "headers": [(b"content-type", b"text/plain")]})
            await send({"type": "http.response.body", "body": b"the studio answers to local names only\n"})
            return

        async def send_with_policy(message):
            if message["type"] == "http.response.start":
                extra = (
                    (b"content-security-policy", POLICY.encode()),
                    (b"x-content-type-options", b"nosniff"),
                    (b"referrer-policy", b"same-origin"),
                )
                message = {**message, "headers": [*message["headers"], *extra]}
            await send(message)

        await self.app(scope, receive, send_with_policy)


@contextlib.contextmanager
def quick_import() -> Iterator[None]:
    """Halve the time that importing Gradio takes: for each component class it parses sources to write a stub
    file for editors beside them (measured: 4.0 s of processor time with, 2.1 s without). It skips classes that
    have no source file, so for its components `inspect.getfile` says just that meanwhile."""
    real = inspect.getfile

    def getfile(thing):
        if isinstance(thing, type) and hasattr(thing, "EVENTS"):
            raise OSError("stub files are not wanted")
        return real(thing)

    inspect.getfile = getfile
    try:
        yield
    finally:
        inspect.getfile = real


def serve(places: Places, host: str, port: int | None, password: str | None):
    """Start the server in the background; returns (Gradio's Blocks, address). OSError if the port is taken."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["GRADIO_TEMP_DIR"] = str(places.uploads)
    for folder in (places.uploads, places.trainings, places.reports, places.pictures):
        folder.mkdir(parents=True, exist_ok=True)
    with quick_import():
        import gradio  # noqa: F401
    from starlette.middleware import Middleware

    from lab.studio import app

    page = app.build(places)
    options = dict(
        server_name=host,
        server_port=port,
        auth=(USER, password) if password else None,
        quiet=True,
        share=False,
        prevent_thread_lock=True,
        show_error=True,
        ssr_mode=False,
        max_file_size=MAX_UPLOAD_BYTES,
        footer_links=[],
        allowed_paths=[str(places.reports), str(places.pictures)],
        enable_monitoring=False,
        run_history=False,
        pwa=False,
        mcp_server=False,
        app_kwargs={"middleware": [Middleware(Guard, local_only=is_loopback(host))]},
        **app.look(),
    )
    _, address, _ = page.launch(**options)
    return page, address


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m lab.studio",
        description="Train, watch and talk to models in the browser.",
        epilog=__doc__.split("\n\n", 1)[1],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    parser.add_argument("--port", type=int, help=f"default: the first free one from {FIRST_PORT} on")
    parser.add_argument("--folder", help="for trainings, texts and reports (default: lab/out/studio)")
    parser.add_argument("--open", action="store_true", help="open the page in the browser")
    try:
        options = parser.parse_args(arguments)
        password = password_for(options.host)
        page, address = serve(Places.of(options.folder), options.host, options.port, password)
    except SystemExit as stop:
        return int(stop.code or 0)
    except Refused as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        print(f"error: {error.name} is missing: pip install -r requirements-lab.txt", file=sys.stderr)
        return 2
    except OSError as error:
        if "port" in str(error):  # Gradio's own sentence speaks of its settings rather than ours
            error = f"port {options.port or FIRST_PORT} on {options.host} is taken; choose another with --port"
        print(f"error: {error}", file=sys.stderr)
        return 5
    print(f"The studio is at {address}  (Ctrl-C ends it; trainings go on)", flush=True)
    if options.open:
        import webbrowser

        webbrowser.open(address)
    with contextlib.suppress(KeyboardInterrupt):
        threading.Event().wait()
    page.close(verbose=False)
    return 0
