"""Start the studio's web server, on this machine only unless told otherwise.

It listens on the loopback address. Another --host is served only with a password (of 8 characters or more), read
from the environment variable STUDIO_PASSWORD or typed at the terminal; the user's name is `studio`. Connections
are not encrypted: between machines, an SSH tunnel to the loopback address is the better way.

Exit codes: 0 ended by Ctrl-C, 2 usage, 5 the port or the folder cannot be used.
"""

from __future__ import annotations

import contextlib
import getpass
import inspect
import os
import socket
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lab.studio.guard import Guard, clean_uploads, is_loopback
from lab.studio.places import MAX_UPLOAD_BYTES, Places, Refused
from trainer.options import command, setting

USER, PASSWORD_VARIABLE, SHORTEST_PASSWORD = "studio", "STUDIO_PASSWORD", 8
FIRST_PORT = 7860


def password_for(host: str) -> str | None:
    """None on the loopback address without STUDIO_PASSWORD; else the password. Refused without a good one."""
    password = os.environ.get(PASSWORD_VARIABLE, "")
    if is_loopback(host) and not password:
        return None
    if not password and sys.stdin is not None and sys.stdin.isatty():
        password = getpass.getpass(f"Password for the studio on {host}: ")
    if len(password) < SHORTEST_PASSWORD and is_loopback(host):
        raise Refused(
            f"{PASSWORD_VARIABLE} has {len(password)} characters; a password needs {SHORTEST_PASSWORD}, or unset it: "
            f"on {host} none is needed"
        )
    if len(password) < SHORTEST_PASSWORD:
        raise Refused(
            f"--host={host} is reachable from other machines, so the studio needs a password of at least "
            f"{SHORTEST_PASSWORD} characters in {PASSWORD_VARIABLE}; or leave --host out"
        )
    return password


def addresses(host: str, port: int) -> str:
    """Where the page is, for people: 0.0.0.0 is where a server listens, not where a browser goes."""
    if host in ("0.0.0.0", "::"):
        here, there = f"http://127.0.0.1:{port}/", f"http://{socket.gethostname()}:{port}/"
        return f"{here} on this machine and at {there} from others"
    return f"http://[{host}]:{port}/" if ":" in host.strip("[]") and "[" not in host else f"http://{host}:{port}/"


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
    """Start the server in the background; returns (Gradio's Blocks, port). OSError if the port is taken."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["GRADIO_TEMP_DIR"] = str(places.uploads)
    for folder in (places.uploads, places.trainings, places.reports, places.pictures):
        folder.mkdir(parents=True, exist_ok=True)
    clean_uploads(places.uploads)
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
        app_kwargs={"middleware": [Middleware(Guard, local_only=is_loopback(host), uploads=places.uploads)]},
        **app.look(),
    )
    page.launch(**options)
    return page, page.server_port


@dataclass(frozen=True)
class Options:
    """Where the studio is."""

    host: str = setting("127.0.0.1", "address", "to listen on; any other than this machine's own needs a password")
    port: int | None = setting(None, "TCP port", f"the first free one from {FIRST_PORT} on", at_least=1, at_most=65535)
    folder: str | None = setting(None, "folder", "for trainings, texts and reports (lab/out/studio)")
    open: bool = setting(False, "flag", "open the page in the browser")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    try:
        _, options = command(__doc__, arguments, Options)
        password = password_for(options.host)
        page, port = serve(Places.of(options.folder), options.host, options.port, password)
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
    print(f"The studio is at {addresses(options.host, port)}  (Ctrl-C ends it; trainings go on)", flush=True)
    if options.open:
        import webbrowser

        webbrowser.open(addresses(options.host, port).split()[0])
    with contextlib.suppress(KeyboardInterrupt):
        threading.Event().wait()
    page.close(verbose=False)
    return 0
