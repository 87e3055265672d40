"""Check what README says against the program: its table of lines, its diff, its Python client.

python .ci/readme.py lines        the lines that the table of constructs names hold them
python .ci/readme.py diff         print the diff of the recipe, for `patch`
python .ci/readme.py client       run the client against a new server, and compare what it prints
"""

import re
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

README = Path("README.md").read_text(encoding="utf-8")
BASE = "http://127.0.0.1:8000"  # where the client expects the server


def blocks(language: str) -> list[str]:
    """Return the code blocks in that language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def check_lines() -> None:
    """Compare each row `| what | code | line |` with that line of main.py."""
    lines = Path("main.py").read_text(encoding="utf-8").splitlines()
    rows = re.findall(r"^\| [^|]* \| `([^`]+)` \| (\d+) \|$", README, re.MULTILINE)
    assert len(rows) > 10, "where is the table?"
    for code, number in rows:
        assert code in lines[int(number) - 1], f"{code} is not in line {number} of main.py"
    print(f"{len(rows)} lines are where README says")


def wait_for_server(server: "subprocess.Popen[bytes]") -> None:
    """Return when the server answers; raise if it does not within ten seconds."""
    for _ in range(100):
        assert server.poll() is None, "the server has ended: is the port in use?"
        try:
            urllib.request.urlopen(f"{BASE}/health", timeout=1).close()
        except OSError:
            time.sleep(0.1)
        else:
            return
    raise AssertionError("the server does not answer")


def check_client() -> None:
    """Run the client as it stands, and compare what it prints with what README says."""
    client = next(block for block in blocks("python") if "httpx.Client" in block)
    expected = blocks("text")[0]
    server = subprocess.Popen([sys.executable, "-m", "uvicorn", "main:app"])
    try:
        wait_for_server(server)
        command = [sys.executable, "-c", client]
        found = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    finally:
        server.terminate()
        server.wait(10)
    assert found.stdout == expected, found.stdout
    print(found.stdout, end="")


match sys.argv[1:]:
    case ["lines"]:
        check_lines()
    case ["diff"]:
        print("".join(blocks("diff")), end="")
    case ["client"]:
        check_client()
    case _:
        raise SystemExit(__doc__)
