"""The wrappers, as a grader runs them: from another folder, with and without the packages."""

import os
import shutil
import subprocess
import sys

import pytest

from tests.helpers import ROOT


def bash(script: str, *argv: object, cwd, **env: str) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHON"} | env
    command = ["bash", str(script), *map(str, argv)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


def test_through_a_link(tmp_path):
    (tmp_path / "faces.sh").symlink_to(ROOT / "hw2_1.sh")
    done = bash("faces.sh", "out", "--count", 2, "--device", "cpu", cwd=tmp_path, PYTHON=sys.executable)
    assert done.returncode == 0, done.stderr
    assert sorted(os.listdir(tmp_path / "out")) == ["0001.png", "0002.png"]


@pytest.mark.skipif(not shutil.which("dash"), reason="needs a shell that is not bash")
def test_another_shell_hands_over_to_bash(tmp_path):
    done = subprocess.run(["dash", ROOT / "hw2_1.sh"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "hw2_1.sh: error: usage: bash hw2_1.sh OUT\n")


def test_a_user_error_is_one_line(tmp_path):
    (tmp_path / "out").write_text("")
    done = bash(ROOT / "hw2_1.sh", "out", cwd=tmp_path, PYTHON=sys.executable)
    assert done.returncode == 1
    assert done.stderr.startswith("p1_test.py: error: out:")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("script", "arguments"), [("hw2_1.sh", "OUT"), ("hw2_2.sh", "OUT"), ("hw2_3.sh", "IMAGES CSV")]
)
def test_without_arguments(tmp_path, script, arguments):
    for given in ([], [""] * len(arguments.split())):
        done = bash(ROOT / script, *given, cwd=tmp_path)
        assert done.returncode == 1
        assert done.stderr == f"{script}: error: usage: bash {script} {arguments}\n"


@pytest.mark.parametrize(
    ("script", "given", "handed_on"),
    [
        ("hw2_1.sh", ["my faces", "--count", "3"], ["p1_test.py", "--out=my faces", "--count", "3"]),
        ("hw2_2.sh", ["-out", "--seed", "1"], ["p2_test.py", "--out=-out", "--seed", "1"]),
        ("hw2_1.sh", ["--help"], ["p1_test.py", "--help"]),
        ("hw2_3.sh", ["--help"], ["p3_test.py", "--help"]),
        (
            "hw2_3.sh",
            ["a b", "c d.csv", "--skip-bad"],
            ["p3_test.py", "--images=a b", "--out=c d.csv", "--skip-bad"],
        ),
    ],
)
def test_arguments_are_handed_on(tmp_path, script, given, handed_on):
    python = tmp_path / "python"  # has all packages, and prints what it is to run
    python.write_text(f'#!/usr/bin/env bash\n[ "$1" = -c ] && exec {sys.executable} "$@"\nprintf "%s\\n" "$@"\n')
    python.chmod(0o755)
    done = bash(ROOT / script, *given, cwd=tmp_path, PYTHON=str(python))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [str(ROOT / handed_on[0]), *handed_on[1:]]


@pytest.fixture
def clone(tmp_path):
    """A repository with one script, whose requirements name a package that ``pip`` below installs."""
    repository = tmp_path / "a clone & more"
    repository.mkdir()
    shutil.copy(ROOT / "python.sh", repository)
    (repository / "requirements.txt").write_text("# comment\nsome-package>=1  # some_module\n")
    (repository / "go.sh").write_text(
        'set -eu\n. "$(dirname "$0")/python.sh"\nfind_python requirements.txt\n'
        "\"$python\" -c 'import sys, some_module; print(sys.prefix, some_module.VALUE)'\n"
    )
    return repository


def stand_in(folder, pip: str) -> str:
    """A Python whose environments have the given ``pip`` in place of the real one (no network in tests)."""
    path = folder / "python"
    path.write_text(
        f'#!/usr/bin/env bash\nif [ "${{1-}}" = -m ] && [ "$2" = venv ]; then\n'
        f'  {sys.executable} -m venv --without-pip "$3"\n'
        f'  cat > "$(echo "$3"/lib/python3.*/site-packages)/pip.py" <<"END"\n{pip}\nEND\n'
        f'else exec {sys.executable} "$@"; fi\n'
    )
    path.chmod(0o755)
    return str(path)


INSTALL = "import pathlib; pathlib.Path(__file__).with_name('some_module.py').write_text('VALUE = 5')"


def test_environment_is_made_once(clone, tmp_path):
    python = stand_in(tmp_path, INSTALL)
    first = bash(clone / "go.sh", cwd=tmp_path, PYTHON=python)
    assert first.returncode == 0, first.stderr
    assert first.stdout.endswith("/.venv 5\n")
    assert "lacks packages of requirements.txt; installing them" in first.stderr
    second = bash(clone / "go.sh", cwd=tmp_path, PYTHON=python)
    assert (second.stdout, second.stderr) == (first.stdout, "")
    with (clone / "requirements.txt").open("a") as f:
        f.write("another  # another_module\n")
    assert "installing" in bash(clone / "go.sh", cwd=tmp_path, PYTHON=python).stderr


def test_no_network_for_the_packages(clone, tmp_path):
    python = stand_in(tmp_path, "raise SystemExit(1)")
    for _ in range(2):  # a failed installation is not taken for a finished one
        done = bash(clone / "go.sh", cwd=tmp_path, PYTHON=python)
        assert done.returncode == 1
        assert done.stderr.splitlines()[-1].endswith("or set PYTHON to a Python that has the packages")
        assert "free 6 GB" in done.stderr


def test_an_environment_that_lost_its_packages_is_made_again(clone, tmp_path):
    """As when the distribution moves to the next Python."""
    python = stand_in(tmp_path, INSTALL)
    assert bash(clone / "go.sh", cwd=tmp_path, PYTHON=python).returncode == 0
    (module,) = (clone / ".venv").rglob("some_module.py")
    module.unlink()
    done = bash(clone / "go.sh", cwd=tmp_path, PYTHON=python)
    assert (done.returncode, done.stdout[-2:]) == (0, "5\n"), done.stderr


def test_two_scripts_started_at_once_make_one_environment(clone, tmp_path):
    python, slow = stand_in(tmp_path, f"import time; time.sleep(1)\n{INSTALL}"), []
    environment = {k: v for k, v in os.environ.items() if k != "PYTHON"} | {"PYTHON": python}
    for _ in range(2):
        slow.append(subprocess.Popen(["bash", clone / "go.sh"], env=environment, stdout=-1, stderr=-1, text=True))
    outputs = [process.communicate() for process in slow]
    assert [out[-2:] for out, _ in outputs] == ["5\n"] * 2, outputs
    assert "".join(errors for _, errors in outputs).count("installing them") == 1


@pytest.mark.parametrize(("least", "enough"), [("1.26", True), ("99.1", False)])
def test_versions_count(clone, tmp_path, least, enough):
    (clone / "requirements.txt").write_text(f"numpy>={least}  # numpy\n")
    (tmp_path / "numpy").mkdir()  # where the user is; no package
    (tmp_path / "some_module.py").write_text("VALUE = 1")
    (clone / "go.sh").write_text('. "$(dirname "$0")/python.sh"\nhas_packages "$PYTHON" requirements.txt && echo yes\n')
    done = bash(clone / "go.sh", cwd=clone, PYTHON=sys.executable)
    assert done.stdout == ("yes\n" if enough else "")


def test_a_python_with_everything_is_used_as_it_is(clone, tmp_path):
    (clone / "requirements.txt").write_text("numpy  # numpy\n")
    (tmp_path / "some_module.py").write_text("VALUE = 1")
    done = bash(clone / "go.sh", cwd=tmp_path, PYTHON=sys.executable, PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert not (clone / ".venv").exists()


def test_a_python_given_from_here(clone, tmp_path):
    """Its path stays good where a wrapper changes the folder."""
    (clone / "requirements.txt").write_text("numpy  # numpy\n")
    (clone / "go.sh").write_text('. "$(dirname "$0")/python.sh"\nfind_python requirements.txt\ncd /\n"$python" -V\n')
    (tmp_path / "here").symlink_to(sys.prefix)
    done = bash(clone / "go.sh", cwd=tmp_path, PYTHON="here/bin/python")
    assert (done.returncode, done.stdout[:7]) == (0, "Python "), done.stderr


def test_no_python(clone, tmp_path):
    done = bash(clone / "go.sh", cwd=tmp_path, PYTHON="no-such-python")
    assert done.returncode == 1
    assert done.stderr == "go.sh: error: no-such-python is no Python 3.10 or later; install one, or set PYTHON to it\n"
