"""Check the README against the program.

python .ci/readme.py diff      print the diff of the recipe for a new task type, for `patch`
python .ci/readme.py client    run the client against a server, and compare its output
python .ci/readme.py http      run the recipe for HTTP work against a server of this script
"""

import asyncio
import re
import runpy
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx

README = Path("README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    """Return the code blocks in a language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def free_port() -> int:
    """Return a port that is free at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for_server(server: "subprocess.Popen[bytes]", base: str) -> None:
    """Return when the server responds; fail after a minute."""
    for _ in range(600):
        assert server.poll() is None, "the server has ended"
        try:
            urllib.request.urlopen(f"{base}/health", timeout=1).close()
        except OSError:
            time.sleep(0.1)
        else:
            return
    raise AssertionError("the server doesn't respond")


def check_client() -> None:
    """Run the client on a free port, and compare its output with the block that follows it."""
    client = next(block for block in blocks("python") if "httpx.Client" in block)
    expected = next(block for block in blocks("text") if "completed '" in block)
    port = free_port()
    command = [sys.executable, "-m", "uvicorn", "main:app", "--port", str(port)]
    server = subprocess.Popen(command)
    try:
        wait_for_server(server, f"http://127.0.0.1:{port}")
        command = [sys.executable, "-c", client.replace(":8000", f":{port}")]
        found = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    finally:
        server.kill()
        server.wait()
    assert found.stdout == expected, found.stdout
    print(found.stdout, end="")


class Hello(BaseHTTPRequestHandler):
    """Responds to every request with the same text."""

    def do_GET(self) -> None:
        """Send the response."""
        self.send_response(404 if self.path == "/missing" else 200)
        self.end_headers()
        self.wfile.write(b"hello")


async def check_http(base: str) -> None:
    """Submit a task for the recipe for HTTP work, and check how it ends."""
    recipe = next(block for block in blocks("python") if "httpx.AsyncClient" in block)
    sys.path.insert(0, ".")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "fetch.py")
        path.write_text(recipe, encoding="utf-8")
        app = runpy.run_path(str(path))["app"]
    transport = httpx.ASGITransport(app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://test") as client,
    ):
        for page, expected in (("/", ("completed", "hello")), ("/missing", ("failed", None))):
            body = {"task_type": "generate_report", "parameters": {"title": base + page}}
            response = await client.post("/tasks", json=body)
            location = response.headers["location"]
            task = (await client.get(location)).json()
            while task["status"] in ("queued", "processing"):
                task = (await client.get(location, params={"wait": True})).json()
            assert (task["status"], task["result"]) == expected, task
            print(task["status"], task["result"], task["error"])


match sys.argv[1:]:
    case ["diff"]:
        print("".join(blocks("diff")), end="")
    case ["client"]:
        check_client()
    case ["http"]:
        pages = ThreadingHTTPServer(("127.0.0.1", 0), Hello)
        threading.Thread(target=pages.serve_forever, daemon=True).start()
        asyncio.run(check_http(f"http://127.0.0.1:{pages.server_port}"))
    case _:
        raise SystemExit(__doc__)
