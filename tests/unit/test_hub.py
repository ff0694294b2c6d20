"""Networks sent to a model hub and fetched from it, by the real library and over real HTTP."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
import torch
from hub_server import TOKEN, Hub, hub
from test_export import error_of, outputs, stream_run

from dynmoe.errors import ResourceError, UserError
from dynmoe.export import export, load, load_from_hub, main
from dynmoe.lab.hub import FILES, check_name, push


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with hub() as running:
        monkeypatch.setenv("HF_ENDPOINT", running.address)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield running


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stream_run(tmp_path_factory.mktemp("runs")).folder


def test_a_network_goes_to_a_hub_and_comes_back(
    run: Path, server: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    main([str(run), str(out), "--push", "alice/net", "--license", "mit"])
    said = capsys.readouterr().out
    assert f"sent: {server.address}/alice/net" in said and "load_from_hub('alice/net')" in said
    assert server.private == {"alice/net": True}
    assert server.files["alice/net"] == {name: (out / name).read_bytes() for name in FILES}
    assert b'load_from_hub("alice/net")' in server.files["alice/net"]["README.md"]
    model = load_from_hub("alice/net", folder=tmp_path / "fetched")
    x = torch.rand(2, 1, 8, 8)
    assert torch.equal(outputs(model, x), outputs(load(out), x))
    assert {path.name for path in (tmp_path / "fetched").iterdir() if path.is_file()} == set(FILES)


def test_one_may_be_for_all_to_see_and_another_version_replaces_it(
    run: Path, server: Hub, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    for licence in ("mit", "cc0-1.0"):
        main([str(run), str(out), "--push", "alice/open", "--public", "--license", licence])
        assert licence.encode() in server.files["alice/open"]["README.md"]
    assert server.private == {"alice/open": False}


@pytest.mark.parametrize("name", ["net", "a/b/c", "a/b c", "../net", "-a/net", "a/"])
def test_a_name_that_no_hub_has(name: str) -> None:
    with pytest.raises(UserError, match="OWNER/NAME of letters") as caught:
        check_name(name)
    assert repr(name) in str(caught.value)


def test_what_is_refused_before_any_work(
    run: Path, server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out = tmp_path / "out"
    argv = [str(run), str(out), "--push", "alice/net"]
    assert "--public has no effect" in error_of([str(run), str(out), "--public"], capsys)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    assert "no token of the hub; log in" in error_of(argv, capsys)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "pip install 'dynmoe[hub]'" in error_of(argv, capsys)
    assert not out.exists() and not server.private


def test_a_hub_that_refuses_fails_or_is_not_there(
    run: Path, server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with pytest.raises(UserError, match=r"out holds no exported network: it has no model\.saf"):
        push(out, "alice/net")
    export(run, out)
    monkeypatch.setenv("HF_TOKEN", "hf_of_another")
    with pytest.raises(UserError, match=r"net was not sent, its .* \(hf auth login.*401"):
        push(out, "alice/net")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(UserError, match="alice/none was not fetched: .* none of that name"):
        load_from_hub("alice/none", folder=tmp_path / "none")
    server.fails = 500
    with pytest.raises(ResourceError, match=r"fails \(.*500.*try again later$"):
        push(out, "alice/net")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    with pytest.raises(ResourceError, match="its files are in .*: .*cannot be reached.* refused"):
        push(out, "alice/net")
    with pytest.raises(ResourceError, match=r"net was not fetched: .*cannot be reached.* refused"):
        load_from_hub("alice/net", folder=tmp_path / "none")
