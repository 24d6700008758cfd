"""Every code block and command of the READMEs, docs/ and CONTRIBUTING is executed here, by another test, or by .ci/run.

Otherwise it is listed with the reason why it cannot be.
"""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from pages import ENGLISH, PAGES, ROOT, TRANSLATED, blocks, prose, read
from remote_code import put_into_hub_cache, run_python

TINY = ROOT / "examples" / "tiny_chatglm"
# tests/repository/test_finetuning_docs.py runs the programs of this page.
FINETUNING = "docs/finetuning.md"
# tests/serving/test_command.py runs this page's program and its curl command against a server.
SERVING = "docs/serving.md"

# Each command names the test that executes it. The test must exist, and .ci/run must hold the commands of CI.
TESTED = {
    "python examples/demo.py --tiny": "tests/cli/test_demo.py::test_transcript_of_the_tiny_checkpoint",
    "python examples/cli_demo.py --tiny": "tests/cli/test_cli_demo.py",
    "python examples/web_demo.py --tiny": "tests/examples/test_web_demo.py",
    "python examples/quantization_quality.py": "tests/examples/test_quantization_quality.py",
    "python -m faster_chatglm_6b demo": "tests/repository/test_packaging.py::test_the_wheel_answers_where_no_clone_is",
    "python -m faster_chatglm_6b chat --tiny": "tests/cli/test_cli_demo.py::test_whatever_is_piped_in",
    "python -m faster_chatglm_6b": "tests/switch/test_switch.py::test_module_prints_the_report",
    "python -m faster_chatglm_6b serve --tiny": "tests/serving/test_command.py::served",
    "python examples/batch_inference.py prompts.jsonl answers.jsonl --tiny": "tests/examples/test_batch_inference.py",
    "python examples/web_demo.py --api http://127.0.0.1:8000": "tests/examples/test_web_api.py",
    "python -m examples.measuring.sizing": "tests/repository/test_deployment.py::test_the_sizing_table_is_computed",
    "python examples/transformers_serve.py": "tests/conversation/test_chat_clients.py::test_transformers_serve",
}
IN_CI = ("make demo", "make test", "make test-oneflow", "make lint")
_SERVE_RUN = "serve run faster_chatglm_6b.serving.ray_serve:build"
_OF_RAY = "tests/serving/test_ray_serve.py builds the same application and reads the file"
_OF_FILES = "tests/repository/test_deployment.py reads the file"
# No test executes these commands; each names the reason, and what is checked instead.
LISTED = {
    "python3 -m pip install -e .": "a network; the Makefile installs so, in CI",
    'python3 -m pip install -e ".[serve]"': "a network; the extras' names are checked here",
    "faster-chatglm-6b serve THUDM/chatglm-6b --bits 4": "the 6B weights; serve --tiny is tested",
    'python3 -m pip install -e ".[ray]"': "a network; the extras' names are checked here",
    "python3 -m pip install servebench": "a network; it is one of the extra dev",
    f"{_SERVE_RUN} tiny=true min_replicas=2": f"it does not end; {_OF_RAY}",
    f"{_SERVE_RUN} model=THUDM/chatglm-6b bits=4 min_replicas=4": f"GPUs; {_OF_RAY}",
    "ray start --head": "it changes the machine",
    "ray start --address HEAD:6379": "a second machine",
    "serve deploy examples/serve_ray.yaml": f"a cluster; {_OF_RAY}",
    "export RAY_SERVE_ENABLE_HA_PROXY=1": "tests/serving/test_ray_serve.py sets it for its own cluster",
    "export RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD=0": "tests/serving/test_ray_serve.py sets it, too",
    "docker build -t faster-chatglm-6b -f examples/deployment/Dockerfile .": f"a network; {_OF_FILES}",
    "docker run --gpus all -p 8000:8000 -v models:/models -e FASTER_CHATGLM_6B_API_KEY faster-chatglm-6b "
    "THUDM/chatglm-6b --bits 4": f"a GPU; {_OF_FILES}",
    "make serve": "it does not end; its target is checked here",
    'python3 -m pip install -e ".[cli,web]"': "a network; the extras' names are checked here",
    "python3 -m pip install git+ADDRESS_OF_THIS_REPOSITORY": "a network, and the address of a repository",
    "python3.10 -m pip install -r tests/oneflow/requirements.txt": "a network; make test-oneflow does it, in CI",
    "python3.10 -m pip install --no-deps -e .": "a network; make test-oneflow does it, in CI",
    "pip install transformers accelerate peft trl bitsandbytes": "a network; the programs after it import them",
    "apt-get install fonts-noto-cjk": "a network and the rights of root",
    "pytest -m gpu": "a GPU",
    "make test-gpu": "a GPU; its target is checked here",
    "make bench": "a GPU; its target is checked here",
    'make bench ARGS="--help"': "nothing; its target is checked here",
    "make test-long": "minutes; its target is checked here",
    "python -m pytest FILE --hypothesis-profile=long": "minutes; make test-long does it for all files",
    "make test TRANSFORMERS=4.57.6 VENV=.venv-4.57.6": "minutes; .ci/run does it",
    'make test ARGS="tests/switch/test_hook.py -k order -x"': "nothing; its file is checked here",
    "bash .ci/run": "it is what runs these tests",
    "python -m faster_chatglm_6b chat": "the 6B weights; chat --tiny is tested",
    "make help": "nothing; its targets are checked here",
    "make pictures": "nothing; tests/repository/test_pictures.py and tests/repository/test_readme.py run its scripts",
}
# This command needs a GPU and is listed by its beginning: the generated tables name the options of their records.
BENCHMARK = "python examples/benchmark.py "
# The tuners of the benchmark log also need a GPU, and the comparison of cards two.
ON_A_GPU = re.compile(
    re.escape(BENCHMARK) + r"|python "
    r"(-m examples\.measuring\.|examples/)(tune_(kernels|quantized_kernels|many_rows)|cards|speculation)(\.py)?( |$)"
)
# tests/serving/test_command.py runs these against a server.
TO_A_SERVER = "curl -s http://127.0.0.1:8000/"
PROGRAMS = ("python", "python3", "python3.10", "make", "pip", "pytest", "bash", "apt-get")


def commands(name: str) -> list[str]:
    """List the commands of the sh blocks and those in the text, without comments."""
    lines = "".join(content for language, content in blocks(name) if language == "sh").splitlines()
    spans = re.findall(r"`([^`\n]+)`", prose(read(name)))
    spans = [span for span in spans if span.split()[0] in PROGRAMS and " " in span]
    found = [re.sub(r"\s+#.*", "", line).strip() for line in lines if line.strip()]
    return [*found, *(span for span in spans if not span.startswith("git+"))]


def python_program() -> str:
    """Join the python blocks of the pages that are read after each other: README first."""
    names = [name for name in ENGLISH if name not in (FINETUNING, SERVING)]
    return "\n".join(content for name in names for language, content in blocks(name) if language == "python")


def test_blocks_are_of_the_kinds_that_are_checked():
    """python runs below, sh holds a command per line, and text is the demo's transcript (test_readme.py)."""
    kinds = [language for name in ENGLISH for language, _ in blocks(name)]
    assert set(kinds) == {"python", "sh", "text"} and kinds.count("text") == 1
    assert [language for language, _ in blocks("docs/demos.md")].count("text") == 1
    for name, least in (("README.md", 3), ("docs/checkpoints.md", 1), ("docs/questions.md", 2)):
        assert [language for language, _ in blocks(name)].count("python") >= least, name
    assert kinds.count("sh") >= 4


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
    bits, response, rounds, executed, is_enabled = run_python(on_a_cpu + python_program() + outcome, tmp_path)
    assert (bits, rounds, executed, is_enabled) == (8, 1, [], True)
    assert isinstance(response, str) and response


@pytest.mark.parametrize("name", PAGES)
def test_every_command_is_executed_or_listed(name):
    for command in commands(name):
        known = command in TESTED or command in IN_CI or command in LISTED or ON_A_GPU.match(command)
        known = known or command.startswith(TO_A_SERVER)
        assert known, f"`{command}` of {name} is neither executed by a test nor listed in {Path(__file__).name}"


def test_nothing_is_listed_that_no_page_says():
    said = [command for name in ENGLISH for command in commands(name)]
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

    named = {command for name in PAGES for command in commands(name) if command.startswith(BENCHMARK)}
    assert named
    for command in named:
        benchmark.parse(shlex.split(command)[2:])  # this ends the process if it does not understand the command


def test_make_has_the_targets_that_are_named():
    targets = {command.split()[1] for name in PAGES for command in commands(name) if command.startswith("make ")}
    assert len(targets) > 3
    for target in targets:
        done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0 and done.stdout.strip(), done.stderr
    shown = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True).stdout
    assert all(f"make {target} " in shown for target in targets)


def test_the_extras_and_files_of_install_commands_exist():
    project = (ROOT / "pyproject.toml").read_text("utf-8")
    extras = set(re.findall(r"^(\w+) = \[", project.split("[project.optional-dependencies]")[1], re.MULTILINE))
    for command in (command for name in ENGLISH for command in commands(name)):
        for asked in re.findall(r"\.\[([\w,]+)\]", command):
            assert set(asked.split(",")) <= extras, command
        for file in re.findall(r"-r (\S+)", command):
            assert (ROOT / file).is_file(), command
        for file in re.findall(r"\btests/[\w/]+\.py", command):
            assert (ROOT / file).is_file(), command


@pytest.mark.parametrize("english", TRANSLATED)
def test_both_languages_have_the_same_code(english):
    """The code is equal without its translated comments; the transcript is equal in full."""
    codes = []
    for name in (english, TRANSLATED[english]):
        pairs = [
            (kind, content if kind == "text" else re.sub(r"\s*#.*", "", content)) for kind, content in blocks(name)
        ]
        codes.append(pairs)
    assert codes[0] == codes[1]
