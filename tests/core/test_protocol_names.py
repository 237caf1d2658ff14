"""Errors by name and the places of the sockets."""

from pathlib import Path

import grpc
import pytest

from hillinfer_core import errors, protocol


def subclasses():
    return [
        value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, Exception)
    ]


@pytest.mark.parametrize("error", subclasses())
def test_every_error_is_found_by_its_name_and_has_a_status(error):
    assert errors.by_name(error.__name__) is error
    assert hasattr(grpc.StatusCode, error.status)
    assert str(error("what to do")) == "what to do"


def test_an_unknown_name_gives_the_base():
    assert errors.by_name("FromTheFuture") is errors.HillInferError
    assert errors.by_name("ValueError") is errors.HillInferError
    assert str(errors.ForeignToken()) == "unknown or foreign token"


def test_the_runtime_directory_can_be_chosen(monkeypatch):
    monkeypatch.setenv("HILLINFER_RUNTIME_DIR", "/chosen")
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/user")
    assert protocol.default_runtime_dir() == Path("/chosen")
    assert protocol.attach_socket(Path("/chosen")) == Path("/chosen/attach.sock")
    assert protocol.grpc_socket(Path("/chosen")) == Path("/chosen/grpc.sock")


def test_the_runtime_directory_falls_back_in_order(monkeypatch, tmp_path):
    monkeypatch.delenv("HILLINFER_RUNTIME_DIR", raising=False)
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/user")
    monkeypatch.setattr(protocol, "_SYSTEM_RUNTIME_DIR", tmp_path / "none")
    assert protocol.default_runtime_dir() == Path("/user/hillinfer")
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    assert protocol.default_runtime_dir().parent == Path("/tmp")
    monkeypatch.setattr(protocol, "_SYSTEM_RUNTIME_DIR", tmp_path)
    assert protocol.default_runtime_dir() == tmp_path
