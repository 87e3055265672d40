"""Check the README against the program: its diff, its Python client, its recipe for HTTP calls.

python .ci/readme.py diff             print the diff of the recipe for a new task type
python .ci/readme.py client [PORT]    run the client against a server, and compare what it prints
python .ci/readme.py http [PORT]      run the recipe for HTTP calls against a small HTTP server

Without PORT, a free port is chosen.
"""

import asyncio
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str, text: str = README) -> list[str]:
    """Return the code blocks in a language, in their order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def python_block(part: str) -> str:
    """Return the only Python block that contains this text."""
    (block,) = [block for block in blocks("python") if part in block]
    return block


def replaced(text: str, old: str, new: str) -> str:
    """Return the text with `old` replaced, which has to occur in it."""
    assert old in text, f"the README does not contain {old}"
    return text.replace(old, new)


def free_port() -> int:
    """Return a port that no server uses at the moment."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return int(unused.getsockname()[1])


def wait_for_server(server: "subprocess.Popen[bytes]", port: int) -> None:
    """Return when the server responds; raise AssertionError after 30 s."""
    for _ in range(300):
        assert server.poll() is None, "the server has exited: is the port in use?"
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1).close()
        except OSError:
            time.sleep(0.1)
        else:
            return
    raise AssertionError("the server does not respond")


def check_client(port: int) -> None:
    """Run the client, and compare its output with the text block that follows it."""
    client = python_block("httpx.Client(")
    expected = blocks("text", README.partition(client)[2])[0]
    client = replaced(client, "127.0.0.1:8000", f"127.0.0.1:{port}")
    command = [sys.executable, "-m", "uvicorn", "main:app", "--port", str(port)]
    server = subprocess.Popen(command, cwd=ROOT)
    try:
        wait_for_server(server, port)
        command = [sys.executable, "-c", client]
        found = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=120, check=True)
    finally:
        server.terminate()
        server.wait(30)
    print(found.stdout, end="")
    assert found.stdout == expected, f"the README says:\n{expected}"


class Handler(BaseHTTPRequestHandler):
    """The service that the recipe calls. It responds with the path, or with 500 for `broken`."""

    def do_GET(self) -> None:  # the name that http.server looks for
        self.send_response(500 if "broken" in self.path else 200)
        self.end_headers()
        self.wfile.write(self.path.encode())

    def log_message(self, *_: Any) -> None:
        """Log nothing."""


async def final_task(api: Any, title: str) -> Any:
    """Submit a report with this title, and poll until its status is final."""
    body = {"task_type": "generate_report", "parameters": {"title": title}}
    response = await api.post("/tasks", json=body)
    assert response.status_code == 202, response.text
    location = response.headers["Location"]
    for _ in range(3):
        task = (await api.get(location, params={"wait": True})).json()
        if task["status"] not in ("queued", "processing"):
            return task
    raise AssertionError(f"the task is not final: {task}")


async def run_recipe(source: str) -> None:
    """Run the app of the recipe: a task that completes, and one that fails."""
    # In the checks, httpx is needed only here, so `diff` runs without it.
    from httpx import ASGITransport, AsyncClient

    sys.path.insert(0, str(ROOT))
    module: dict[str, Any] = {}
    exec(compile(source, "README.md", "exec"), module)  # noqa: S102  # it is our own README
    app = module["app"]
    transport = ASGITransport(app)
    async with (
        app.router.lifespan_context(app),
        AsyncClient(transport=transport, base_url="http://test") as api,
    ):
        task = await final_task(api, "Q3")
        assert (task["status"], task["result"]) == ("completed", "/?title=Q3&sections=3"), task
        task = await final_task(api, "broken")
        assert task["error"]["code"] == "task_failed", task
        print(task["error"]["message"])
    assert app.state.http.is_closed


def check_http(port: int) -> None:
    """Run the recipe for HTTP calls against a server of this process."""
    recipe = python_block("httpx.AsyncClient(")
    recipe = replaced(recipe, "127.0.0.1:9000", f"127.0.0.1:{port}")
    with HTTPServer(("127.0.0.1", port), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            asyncio.run(run_recipe(recipe))
        finally:
            server.shutdown()
    print("the recipe for HTTP calls works")


match sys.argv[1:]:
    case ["diff"]:
        print("".join(blocks("diff")), end="")
    case ["client", *ports] if len(ports) <= 1:
        check_client(int(ports[0]) if ports else free_port())
    case ["http", *ports] if len(ports) <= 1:
        check_http(int(ports[0]) if ports else free_port())
    case _:
        raise SystemExit(__doc__)
