"""Every code block and command of the READMEs is executed here, by another test, or by .ci/run, or is listed with the
reason why it cannot be."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from remote_code import put_into_hub_cache, run_python

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "examples" / "tiny_chatglm"
NAMES = ("README.md", "README.zh.md")

# Commands by who executes them. A test's name must exist, and .ci/run must hold the command.
TESTED = {
    "python examples/demo.py --tiny": "tests/cli/test_demo.py::test_transcript_of_the_tiny_checkpoint",
    "python examples/cli_demo.py --tiny": "tests/cli/test_cli_demo.py",
    "python examples/web_demo.py --tiny": "tests/examples/test_web_demo.py",
    "python examples/quantization_quality.py": "tests/examples/test_quantization_quality.py",
    "python -m faster_chatglm_6b demo": "tests/repository/test_packaging.py::test_the_wheel_answers_where_no_clone_is",
    "python -m faster_chatglm_6b chat --tiny": "tests/cli/test_cli_demo.py::test_whatever_is_piped_in",
    "python -m faster_chatglm_6b": "tests/switch/test_switch.py::test_module_prints_the_report",
}
IN_CI = ("make demo", "make test", "make test-oneflow")
# Commands that no test executes, and what is checked of them instead.
LISTED = {
    "python3 -m pip install -e .": "a network; the Makefile installs so, in CI",
    'python3 -m pip install -e ".[cli,web]"': "a network; the extras' names are checked here",
    "python3 -m pip install git+ADDRESS_OF_THIS_REPOSITORY": "a network, and the address of a repository",
    "python3.10 -m pip install -r tests/oneflow/requirements.txt": "a network; make test-oneflow does it, in CI",
    "python3.10 -m pip install --no-deps -e .": "a network; make test-oneflow does it, in CI",
    "pytest -m gpu": "a GPU",
    "make help": "nothing; its targets are checked here",
    "make pictures": "nothing; tests/repository/test_pictures.py and tests/repository/test_readme.py run its scripts",
}
# Commands that need a GPU and are listed by their beginning: the generated tables name the options of their records.
ON_A_GPU = "python examples/benchmark.py "
PROGRAMS = ("python", "python3", "python3.10", "make", "pip", "pytest", "bash", "apt-get")


def blocks(name: str) -> list[tuple[str, str]]:
    """(language, content) of the fenced blocks of a README."""
    text = (ROOT / name).read_text("utf-8")
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    assert len(found) * 2 == len(re.findall(r"^```", text, re.MULTILINE)), "a block that is not closed"
    return found


def commands(name: str) -> list[str]:
    """The commands of the sh blocks and those in the text, without comments."""
    lines = "".join(content for language, content in blocks(name) if language == "sh").splitlines()
    prose = re.sub(r"^```.*?^```$", "", (ROOT / name).read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    spans = [span for span in re.findall(r"`([^`\n]+)`", prose) if span.split()[0] in PROGRAMS and " " in span]
    found = [re.sub(r"\s+#.*", "", line).strip() for line in lines if line.strip()]
    return [*found, *(span for span in spans if not span.startswith("git+"))]


def python_program(name: str) -> str:
    return "\n".join(content for language, content in blocks(name) if language == "python")


def test_blocks_are_of_the_kinds_that_are_checked():
    """python: executed below. sh: each line is a command. text: the demo's transcript, in test_readme.py."""
    kinds = [language for language, _ in blocks("README.md")]
    assert set(kinds) == {"python", "sh", "text"} and kinds.count("text") == 1
    assert kinds.count("python") >= 4 and kinds.count("sh") >= 4


def test_the_python_blocks_run_one_after_the_other(tmp_path):
    """The hub id is a local download of the tiny checkpoint; without a GPU, half precision and cuda() stay float32."""
    put_into_hub_cache(tmp_path / "hf_home", "THUDM/chatglm-6b", "main", TINY)
    on_a_cpu = (
        "import torch\n"
        "torch.nn.Module.cuda = lambda self, device=None: self\n"
        "torch.nn.Module.half = lambda self: self.float()\n"
    )
    outcome = (
        "import faster_chatglm_6b as package\n"
        'is_enabled = "enabled" in str(package.status())\n'
        "answer([model.config.quantization_bit, response, len(history), executed(), is_enabled])\n"
    )
    bits, response, rounds, executed, is_enabled = run_python(
        on_a_cpu + python_program("README.md") + outcome, tmp_path
    )
    assert (bits, rounds, executed, is_enabled) == (8, 1, [], True)
    assert isinstance(response, str) and response


@pytest.mark.parametrize("name", NAMES)
def test_every_command_is_executed_or_listed(name):
    for command in commands(name):
        known = command in TESTED or command in IN_CI or command in LISTED or command.startswith(ON_A_GPU)
        assert known, f"`{command}` of {name} is neither executed by a test nor listed in {Path(__file__).name}"


def test_nothing_is_listed_that_the_readme_does_not_say():
    said = commands("README.md")
    assert [command for command in (*TESTED, *IN_CI, *LISTED) if command not in said] == []


@pytest.mark.parametrize("command", TESTED)
def test_the_test_of_a_command_exists_and_runs_its_program(command):
    file, _, function = TESTED[command].partition("::")
    source = (ROOT / file).read_text("utf-8")
    assert f"def {function or 'test_'}" in source
    program = shlex.split(command)[1]
    if program == "-m":
        assert '"-m"' in source or 'main(["chat"' in source
    else:
        assert (ROOT / program).is_file() and Path(program).name in source


@pytest.mark.parametrize("command", IN_CI)
def test_ci_runs_the_commands_that_install(command):
    lines = (ROOT / ".ci" / "run").read_text("utf-8").splitlines()
    assert any(line.split("|")[0].strip() == command for line in lines)


def test_the_benchmark_takes_the_options_that_are_named():
    sys.path.append(str(ROOT / "examples"))
    import benchmark

    named = {command for name in NAMES for command in commands(name) if command.startswith(ON_A_GPU)}
    assert named
    for command in named:
        benchmark.parse(shlex.split(command)[2:])  # ends the process where it does not understand


def test_make_has_the_targets_that_are_named():
    targets = {command.split()[1] for name in NAMES for command in commands(name) if command.startswith("make ")}
    assert len(targets) > 3
    for target in targets:
        done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0 and done.stdout.strip(), done.stderr
    shown = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True).stdout
    assert all(f"make {target} " in shown for target in targets)


def test_the_extras_and_files_of_install_commands_exist():
    project = (ROOT / "pyproject.toml").read_text("utf-8")
    extras = set(re.findall(r"^(\w+) = \[", project.split("[project.optional-dependencies]")[1], re.MULTILINE))
    for command in commands("README.md"):
        for asked in re.findall(r"\.\[([\w,]+)\]", command):
            assert set(asked.split(",")) <= extras, command
        for file in re.findall(r"-r (\S+)", command):
            assert (ROOT / file).is_file(), command


def test_both_readmes_have_the_same_code():
    """Comments are translated; the transcript is the same in full."""
    codes = []
    for name in NAMES:
        pairs = [
            (kind, content if kind == "text" else re.sub(r"\s*#.*", "", content)) for kind, content in blocks(name)
        ]
        codes.append(pairs)
    assert codes[0] == codes[1]
