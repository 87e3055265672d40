"""Run the blocks of the README, in a copy of the project, and compare what they print.

python .ci/readme.py session    the session with curl
python .ci/readme.py client     the client in Python
python .ci/readme.py modules    the modules, their tests and their types
python .ci/readme.py edits      the changes of main.py, and what the tests say to them
"""

import asyncio
import importlib
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from contextlib import AsyncExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer, SimpleHTTPRequestHandler
from pathlib import Path
from typing import Any, ClassVar

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SESSION = README.partition("## A session\n")[2].partition("## A client")[0]


def copy_of_the_project() -> Path:
    """Return a new folder with the four files and the Python modules of the README."""
    folder = Path(tempfile.mkdtemp(prefix="readme-"))
    for name in ("main.py", "test_main.py", "requirements.txt", "README.md"):
        shutil.copy(ROOT / name, folder)
    for language, block in BLOCK.findall(README):
        name = re.match(r"# (\w+\.py)\n", block)
        if language == "python" and name and name[1] not in ("main.py", "client.py"):
            with (folder / name[1]).open("a", encoding="utf-8") as file:
                file.write(block)
    return folder


def free_port() -> int:
    """Return a port that no server uses at the moment."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return int(unused.getsockname()[1])


@contextmanager
def serving(**variables: str) -> Any:
    """Run main.py under uvicorn, and yield its port."""
    port = free_port()
    command = [sys.executable, "-m", "uvicorn", "main:app", "--port", str(port)]
    server = subprocess.Popen(command, cwd=ROOT, env=os.environ | variables)
    try:
        for _ in range(300):
            assert server.poll() is None, "the server has exited"
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1).close()
                break
            except OSError:
                time.sleep(0.1)
        yield port
    finally:
        server.terminate()
        server.wait(30)


def normal(text: str) -> str:
    """Replace what differs from run to run."""
    text = re.sub(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", "ID", text)
    text = re.sub(r'"20\d\d-\d\d-\d\dT[\d:.]+Z"', "TIME", text)
    text = re.sub(r"^date: .*$", "date: DATE", text, flags=re.MULTILINE)
    return (
        re.sub(r"(retry-after: |content-length: |t=|again in )\d+", r"\1N", text)
        .replace("\r", "")
        .strip()
    )


def check_session() -> None:
    """Run the commands of the session in one shell, and compare the output of each block."""
    start, *blocks = BLOCK.findall(SESSION)
    variable = re.match(r"(\w+)=(\S+) ", start[1])
    assert variable, start
    script = ""
    expected = []
    for language, block in blocks:
        if language == "sh":
            script += f"{block}\n"
        else:
            script += "echo; echo ------\n"
            expected.append(normal(block))
    with serving(**{variable[1]: variable[2]}) as port:
        command = ["bash", "-c", script.replace("127.0.0.1:8001", f"127.0.0.1:{port}")]
        output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    print(output)
    assert [normal(part) for part in output.split("------")[:-1]] == expected


def check_client() -> None:
    """Run the client, and compare its output with the text block that follows it."""
    (client,) = [block for _, block in BLOCK.findall(README) if block.startswith("# client.py")]
    expected = BLOCK.findall(README.partition(f"{client}```\n")[2])[0][1]
    with serving() as port:
        client = client.replace("127.0.0.1:8000", f"127.0.0.1:{port}")
        command = [sys.executable, "-c", client]
        found = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=120, check=True)
    print(found.stdout, end="")
    assert found.stdout == expected, f"the README says:\n{expected}"


def run(folder: Path, *command: str) -> str:
    """Run a Python module in a folder, and return what it prints."""
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, stdout=subprocess.PIPE, text=True, check=False
    )
    print(done.stdout[-1500:])
    assert done.returncode == 0, command
    return done.stdout


async def check_apps() -> None:
    """Start the apps of the modules, and send each a request that shows what it is for."""
    from httpx import ASGITransport, AsyncClient

    body = {"task_type": "simulate_failure"}

    def client(app: Any, host: str = "10.0.0.1") -> Any:
        return AsyncClient(transport=ASGITransport(app, client=(host, 1)), base_url="http://test")

    module: dict[str, Any] = {}
    for name in ("service", "parent", "progress", "cors", "keys"):  # the last three share an app
        module[name] = importlib.import_module(name)
    async with AsyncExitStack() as stack:
        parent = module["parent"].parent
        await stack.enter_async_context(parent.router.lifespan_context(parent))
        api = client(parent)
        key = {"X-API-Key": "secret"}
        response = await api.post("/jobs/tasks", json=body, headers=key)
        assert response.headers["location"].startswith("/jobs/tasks/"), response.text

        api = client(module["keys"].app)
        response = await api.post("/tasks", json=body)
        assert (response.status_code, response.json()["title"]) == (401, "Unauthorized")
        assert (await api.get("/health")).status_code == 200
        assert (await api.post("/tasks", json=body, headers=key)).status_code == 202
        assert "setInterval" in (await api.get("/progress", headers=key)).text
        origin = {"Origin": "https://example.org", **key}
        response = await api.get("/tasks", headers=origin)
        assert response.headers["access-control-allow-origin"] == "https://example.org"
        behind = AsyncClient(transport=ASGITransport(module["keys"].app, root_path="/api"))
        assert (await behind.get("http://test/api/health")).status_code == 200

        service = module["service"].app
        await stack.enter_async_context(service.router.lifespan_context(service))

        async def fetch(name: str, host: str) -> Any:
            api = client(service, host)  # a client of its own, because each is limited
            submission = {"task_type": "fetch", "parameters": {"name": name}}
            location = (await api.post("/tasks", json=submission)).headers["location"]
            task = (await api.get(location)).json()
            while task["status"] in ("queued", "processing"):
                task = (await api.get(location, params={"wait": True})).json()
            return task["result"] or task["error"]

        # Another port, because port 9000 may be in use.
        with HTTPServer(("127.0.0.1", 0), SimpleHTTPRequestHandler) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            service.state.client.base_url = f"http://127.0.0.1:{server.server_port}"
            assert (await fetch("README.md", "10.0.0.2")).startswith("# A task manager API")
            assert (await fetch("no.txt", "10.0.0.3"))[
                "message"
            ] == "The service responded with 404."
            server.shutdown()
        assert (await fetch("README.md", "10.0.0.4"))["message"] == "The service does not respond."
    print("the apps work")


def check_modules() -> None:
    """Run the modules and their tests, with the whole suite, and check their types."""
    folder = copy_of_the_project()
    run(folder, "-m", "pytest", "-q")
    typed = ["jobs.py", "test_jobs.py", "recipes.py", "test_recipes.py", "service.py", "engine.py"]
    run(folder, "-m", "mypy", "--strict", *typed)
    engine = README.partition("# engine.py\n")[2]
    assert run(folder, "engine.py") == BLOCK.findall(engine.partition("```\n")[2])[0][1]
    sys.path.insert(0, str(folder))
    os.chdir(folder)
    asyncio.run(check_apps())


class Receiver(BaseHTTPRequestHandler):
    """The receiver of the webhook."""

    received: ClassVar[list[bytes]] = []

    def do_POST(self) -> None:
        self.received.append(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(204)
        self.end_headers()


def apply(folder: Path, section: str) -> None:
    """Change main.py as a section of the README says."""
    path = folder / "main.py"
    source = path.read_text(encoding="utf-8")

    def replace(old: str, new: str) -> None:
        nonlocal source
        assert source.count(old) == 1, old
        source = source.replace(old, new)

    for old, new in re.findall(r"replace `(.+?)` by `(.+?)`", section):
        replace(old, new)
    if "USERS" in section:
        users = re.findall(r"add `(USERS = .+?)`", section)[0]
        replace("class RateLimitMiddleware:", f"{users}\n\n\nclass RateLimitMiddleware:")
        replace("import MutableHeaders", "import Headers, MutableHeaders")
    if "send_changes" in section:
        reset, change, start = re.findall(r"^- (?:At|In) .+: `(.+)`$", section, re.MULTILINE)
        replace("        self._busy = 0", f"        {reset}\n        self._busy = 0")
        replace(
            "        return True\n\n    def _stop",
            f"        {change}\n        return True\n\n    def _stop",
        )
        timer = "in_background(clean_up(manager, limiter, settings.cleanup_interval)),"
        replace(timer, f"{timer}\n            {start}")
        (block,) = [text for _, text in BLOCK.findall(section)]
        replace("def create_app(", f"{block}\n\ndef create_app(")
    path.write_text(source, encoding="utf-8")


def suite(folder: Path) -> str:
    """Run the tests, and return what the README should say about them."""
    command = [sys.executable, "-m", "pytest", "-q", "--tb=no", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, text=True, check=False)
    failed = re.search(r"(\d+) failed", done.stdout)
    count = int(failed[1]) if failed else 0
    return {0: "All tests pass.", 1: "One test fails"}.get(count, f"{count} tests fail")


def check_edits() -> None:
    """Apply each change of main.py to a copy, and run the tests."""
    for heading in ("A limit for each key", "A limit for POST only", "A webhook"):
        section = README.partition(f"### {heading}\n")[2].partition("\n###")[0]
        folder = copy_of_the_project()
        for extra in folder.glob("test_[jr]*.py"):
            extra.unlink()
        apply(folder, section)
        result = suite(folder)
        print(heading, "-", result)
        assert result in section, f"the README should say: {result}"
    # The webhook is sent.
    with HTTPServer(("127.0.0.1", 0), Receiver) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        os.environ["WEBHOOK_URL"] = f"http://127.0.0.1:{server.server_port}/"
        run(folder, "-c", WEBHOOK)
        server.shutdown()
    assert len(Receiver.received) == 2, Receiver.received


WEBHOOK = """
import asyncio, main

async def program():
    app = main.create_app(main.Settings(time_scale=0))
    async with app.router.lifespan_context(app):
        task = app.state.manager.submit("compute_sum", {"numbers": [1]})
        while task["status"] != "completed":
            await app.state.manager.wait(task["task_id"])
        await asyncio.sleep(0.5)

asyncio.run(program())
"""


match sys.argv[1:]:
    case ["session"]:
        check_session()
    case ["client"]:
        check_client()
    case ["modules"]:
        check_modules()
    case ["edits"]:
        check_edits()
    case _:
        raise SystemExit(__doc__)
