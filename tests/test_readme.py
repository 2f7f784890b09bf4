"""The README's commands run, and its links lead somewhere."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def shell_commands():
    blocks = re.findall(r"```sh\n(.*?)```", README, flags=re.S)
    return [line for block in blocks for line in block.splitlines() if line.strip()]


def test_the_two_commands_come_first():
    assert README.index("make demo") < README.index("make test") < 600


@pytest.mark.parametrize("target", ["demo", "test", "lint"])
def test_make_knows_its_targets(target):
    done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_command_runs(edgec, tmp_path):
    """In the README's order, in a folder that has the examples."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    commands = shell_commands()
    assert len(commands) >= 8
    for line in commands:
        program, *args = shlex.split(line)
        assert program == "edgec", line
        done = edgec(*args, cwd=tmp_path)
        assert done.returncode == 0, (line, done.stderr)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        if "://" not in link:
            assert (page.parent / link).exists(), (page.name, link)
