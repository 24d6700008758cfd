"""The choice of the framework and the versions that are accepted."""

import pytest

from faster_chatglm_6b import backend


@pytest.fixture
def installed(monkeypatch):
    """Decide which packages seem to be installed."""

    def set_installed(*packages):
        monkeypatch.setattr(backend, "_is_installed", packages.__contains__)

    return set_installed


@pytest.fixture
def versions(monkeypatch):
    """Decide which versions seem to be installed."""

    def set_versions(**found):
        monkeypatch.setattr(backend, "installed_version", found.get)

    return set_versions


@pytest.mark.parametrize("value", [None, "", "auto", " AUTO "])
def test_auto_takes_torch_and_says_why(value, installed):
    installed("torch")
    environment = {} if value is None else {backend.BACKEND_VARIABLE: value}
    assert backend.choose_backend(environment) == ("torch", "auto: PyTorch is installed and OneFlow is not")


def test_auto_with_both_says_that_oneflow_is_not_served_yet(installed):
    installed("torch", "oneflow")
    chosen = backend.choose_backend({})
    assert chosen.name == "torch"
    assert "no OneFlow backend" in chosen.reason


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


@pytest.mark.parametrize(
    ("packages", "message"),
    [
        (("torch",), "asks for OneFlow, which is not installed.*unset FASTER_CHATGLM_6B_BACKEND"),
        (("torch", "oneflow"), "which is installed, but this version .* has no OneFlow backend yet"),
    ],
)
def test_oneflow_on_request(packages, message, installed):
    installed(*packages)
    with pytest.raises(ImportError, match=message):
        backend.choose_backend({backend.BACKEND_VARIABLE: "oneflow"})


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
    assert backend.is_too_old(version, "4.45") is old
    if not old:
        return backend.require_transformers()
    with pytest.raises(ImportError, match=f"needs transformers 4.45 or newer .* found {version}; upgrade it with"):
        backend.require_transformers()


@pytest.mark.parametrize(("version", "old"), [("2.3.1+cpu", True), ("2.4.0a0+git12", False), ("2.13.0+cu128", False)])
def test_torch_floor(version, old, versions):
    versions(torch=version)
    assert backend.is_too_old(version, "2.4") is old
    if not old:
        return backend.require_torch()
    with pytest.raises(ImportError, match="needs torch 2.4 or newer"):
        backend.require_torch()


def test_installed_version_is_the_metadatas():
    import transformers

    assert backend.installed_version("transformers") == transformers.__version__
    assert backend.installed_version("no_such_package_as_this") is None
