"""The backend follows the installed packages and the environment, and versions that do not suit it are refused."""

import sys

import pytest

from faster_chatglm_6b import backend
from faster_chatglm_6b import versions as installed_versions


@pytest.fixture
def installed(monkeypatch):
    """Decide which packages seem to be installed."""

    def set_installed(*packages):
        monkeypatch.setattr(installed_versions, "is_installed", packages.__contains__)

    return set_installed


@pytest.fixture
def versions(monkeypatch):
    """Decide which versions seem to be installed."""

    def set_versions(**found):
        monkeypatch.setattr(installed_versions, "installed_version", found.get)

    return set_versions


@pytest.mark.parametrize("value", [None, "", "auto", " AUTO "])
def test_auto_takes_torch_and_says_why(value, installed):
    installed("torch")
    environment = {} if value is None else {backend.BACKEND_VARIABLE: value}
    assert backend.choose_backend(environment) == ("torch", "auto: PyTorch is installed and OneFlow is not")


@pytest.fixture
def not_imported(monkeypatch):
    """Pretend that the process has imported neither torch nor transformers yet."""
    for name in ("torch", "transformers"):
        monkeypatch.delitem(sys.modules, name, raising=False)


def test_auto_with_both_stays_with_a_torch_that_was_imported(installed):
    installed("torch", "oneflow")
    chosen = backend.choose_backend({})
    assert chosen == (
        "torch",
        "auto: PyTorch and OneFlow are installed, but torch was imported before and is bound to PyTorch",
    )


@pytest.mark.parametrize(
    ("found", "fused", "name", "reason"),
    [
        ({"oneflow": "0.9.0", "transformers": "4.27.1"}, None, "torch", "OneFlow 0.9.0 lacks most"),
        ({"oneflow": "1.0.0", "transformers": "4.57.6"}, None, "torch", "does not work with transformers 4.57.6"),
        ({"oneflow": "1.0.0", "transformers": "4.27.1"}, "OneFlow finds no GPU", "torch", "OneFlow finds no GPU"),
        (
            {"oneflow": "1.0.0", "transformers": "4.27.1"},
            "OneFlow's attention does not run on compute capability 9.0",
            "torch",
            "capability 9.0",
        ),
        ({"oneflow": "0.9.1.dev20230409+cu117"}, None, "oneflow", "has its fused operators and supports this GPU"),
        ({"oneflow": "1.0.0", "transformers": "4.29.2"}, None, "oneflow", "has its fused operators"),
    ],
)
def test_auto_with_both(found, fused, name, reason, installed, versions, not_imported, monkeypatch):
    installed("torch", "oneflow")
    versions(**found)
    monkeypatch.setattr(backend.oneflow_compat, "why_not_fused", lambda: fused)
    chosen = backend.choose_backend({})
    assert chosen.name == name
    assert reason in chosen.reason


def test_auto_with_oneflow_alone(installed, versions, not_imported):
    installed("oneflow")
    versions(transformers="4.27.1")
    assert backend.choose_backend({}) == ("oneflow", "auto: OneFlow is installed and PyTorch is not")


def test_auto_without_any_framework_leaves_the_error_to_the_load(installed, versions):
    installed()
    versions(transformers="4.57.6")
    assert "PyTorch is not installed" in backend.choose_backend({}).reason
    with pytest.raises(ImportError, match="needs torch 2.4 or newer .* found none; install it with `pip install"):
        backend.require_torch()


def test_torch_on_request(installed):
    installed("torch")
    assert backend.choose_backend({backend.BACKEND_VARIABLE: "torch"}).reason == "FASTER_CHATGLM_6B_BACKEND=torch"


def test_torch_on_request_but_missing(installed):
    installed("oneflow")
    with pytest.raises(ImportError, match="asks for PyTorch, which is not installed; install it"):
        backend.choose_backend({backend.BACKEND_VARIABLE: "torch"})


def test_oneflow_on_request(installed, versions, not_imported):
    installed("torch", "oneflow")
    versions(transformers="4.28.1")
    environment = {backend.BACKEND_VARIABLE: "oneflow"}
    assert backend.choose_backend(environment) == ("oneflow", "FASTER_CHATGLM_6B_BACKEND=oneflow")


def test_oneflow_on_request_but_missing(installed):
    installed("torch")
    with pytest.raises(ImportError, match="asks for OneFlow, which is not installed.*unset FASTER_CHATGLM_6B_BACKEND"):
        backend.choose_backend({backend.BACKEND_VARIABLE: "oneflow"})


def test_oneflow_on_request_after_torch(installed):
    installed("torch", "oneflow")
    with pytest.raises(ImportError, match="torch was imported before .* put `import faster_chatglm_6b` above every"):
        backend.choose_backend({backend.BACKEND_VARIABLE: "oneflow"})


@pytest.mark.parametrize("version", ["4.26.1", "4.27.0", "4.30.2", "4.57.6", "5.23.0"])
def test_oneflow_with_a_transformers_that_it_cannot_carry(version, installed, versions, not_imported):
    installed("oneflow")
    versions(transformers=version)
    for environment in ({}, {backend.BACKEND_VARIABLE: "oneflow"}):
        with pytest.raises(ImportError, match=f"transformers 4.27.1 to 4.29.2, but {version} is installed; install"):
            backend.choose_backend(environment)


def test_torch_with_a_transformers_for_oneflow(installed, versions):
    installed("torch", "oneflow")
    versions(transformers="4.27.1")
    with pytest.raises(ImportError, match="4.27.1 is installed, which suits OneFlow; set .*=oneflow, or upgrade"):
        backend.require_transformers()


def test_the_floors_of_torch_do_not_bind_oneflow(versions, monkeypatch):
    versions(transformers="4.27.1", oneflow="0.9.0")
    monkeypatch.setattr(backend, "_current", backend.Backend("oneflow", "because"))
    backend.require_torch()
    backend.require_transformers()
    assert backend.framework_lines() == ["transformers   4.27.1", "oneflow        0.9.0, in the place of torch"]
    versions(transformers="4.57.6", oneflow="0.9.0")
    with pytest.raises(ImportError, match="4.57.6 is installed"):
        backend.require_transformers()


def test_unknown_backend():
    with pytest.raises(ValueError, match="'jax' is not a backend; set it to one of auto, torch, oneflow, or unset it"):
        backend.choose_backend({backend.BACKEND_VARIABLE: "jax"})


@pytest.mark.parametrize(
    ("version", "old"),
    [
        ("4.44.2", True),
        ("4.45.0", False),
        ("4.45.0.dev0", False),
        ("4.100.0", False),
        ("5.0.0rc1", False),
        ("3.9", True),
    ],
)
def test_transformers_floor(version, old, versions):
    versions(transformers=version)
    assert installed_versions.is_too_old(version, "4.45") is old
    if not old:
        return backend.require_transformers()
    with pytest.raises(ImportError, match=f"needs transformers 4.45 or newer .* found {version}; upgrade it with"):
        backend.require_transformers()


@pytest.mark.parametrize(("version", "old"), [("2.3.1+cpu", True), ("2.4.0a0+git12", False), ("2.13.0+cu128", False)])
def test_torch_floor(version, old, versions):
    versions(torch=version)
    assert installed_versions.is_too_old(version, "2.4") is old
    if not old:
        return backend.require_torch()
    with pytest.raises(ImportError, match="needs torch 2.4 or newer"):
        backend.require_torch()


def test_installed_version_is_the_metadatas():
    import transformers

    assert installed_versions.installed_version("transformers") == transformers.__version__
    assert installed_versions.installed_version("no_such_package_as_this") is None
