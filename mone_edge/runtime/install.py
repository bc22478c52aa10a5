"""llama-cpp-python with the patched libraries, in this Python environment.

The package of the source distribution is plain Python over shared libraries, so that a wheel is
put together from it and from the libraries that the build made: nothing is compiled again, and
`import llama_cpp` finds the patched library without any environment variable.
"""

import base64
import hashlib
import importlib
import importlib.metadata
import importlib.util
import json
import mmap
import sysconfig
import zipfile
from pathlib import Path

from mone_edge.errors import MoneEdgeError
from mone_edge.runtime.fetch import run_pip
from mone_edge.runtime.layout import Layout, library_name

PATCH_SYMBOL = "llama_model_n_expert_kept"
# what `import llama_cpp` loads, and what those load
PACKAGE_LIBRARIES = (
    "ggml", "ggml-base", "ggml-cpu", "ggml-vulkan", "ggml-cuda", "ggml-metal",
    "llama", "llama-common", "mtmd",
)  # fmt: skip
DEPENDENCIES = ("typing-extensions", "numpy", "diskcache", "jinja2")
TAG_NAME = "mone-edge.json"


def exports_patch(library: Path) -> bool:
    """Whether a llama library file is a patched one, without loading it."""
    try:
        with (
            library.open("rb") as handle,
            mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as content,
        ):
            return content.find(PATCH_SYMBOL.encode() + b"\0") >= 0
    except (OSError, ValueError):
        return False


def package_lib_dir() -> Path | None:
    """The folder of the libraries of the `llama_cpp` that an import would find, if any."""
    importlib.invalidate_caches()
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        return None
    return Path(spec.origin).parent / "lib"


def installed_key() -> str | None:
    """The build key of the installed llama-cpp-python if it is one of ours, else None."""
    folder = package_lib_dir()
    if folder is None or not exports_patch(folder / library_name("llama")):
        return None
    try:
        key = json.loads((folder / TAG_NAME).read_text(encoding="utf-8"))["build_key"]
    except (OSError, ValueError, KeyError):
        return None
    return str(key)


def install_package(layout: Layout, wheel: Path, *, offline: bool) -> None:
    """Install `wheel` unless this very build is installed.

    Raises:
        MoneEdgeError: pip failed, or the import would still find another llama_cpp.
    """
    if installed_key() == layout.build_key:
        return
    failure = "cannot install the patched llama-cpp-python"
    if missing := missing_dependencies():
        if offline:
            raise MoneEdgeError(f"{failure}: offline, and {', '.join(missing)} not installed")
        run_pip(["install", *missing], failure)
    run_pip(["install", "--no-index", "--no-deps", "--force-reinstall", str(wheel)], failure)
    if installed_key() != layout.build_key:
        raise MoneEdgeError(
            f"the patched llama-cpp-python is installed in {sysconfig.get_path('purelib')}, but "
            f"`import llama_cpp` finds {package_lib_dir()}; remove that one"
        )


def missing_dependencies() -> list[str]:
    """What llama-cpp-python needs and this environment lacks."""
    missing = []
    for name in DEPENDENCIES:
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    return missing


def make_wheel(layout: Layout) -> Path:
    """Put the wheel of llama-cpp-python with the libraries of `layout` into its folder."""
    version = f"{layout.version}+mone.{layout.build_key}"
    platform_tag = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    wheel = layout.root / f"llama_cpp_python-{version}-py3-none-{platform_tag}.whl"
    temporary = wheel.with_suffix(".tmp")
    with zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        records = [
            *(write_file(archive, name, file.read_bytes()) for name, file in contents(layout)),
            *(
                write_file(archive, name, text.encode())
                for name, text in metadata(layout, version, platform_tag).items()
            ),
        ]
        record = f"llama_cpp_python-{version}.dist-info/RECORD"
        archive.writestr(record, "".join([*records, f"{record},,\n"]))
    return temporary.replace(wheel)


def contents(layout: Layout) -> list[tuple[str, Path]]:
    """The package's modules and libraries: name in the wheel, file."""
    modules = [
        (file.relative_to(layout.python).as_posix(), file)
        for file in sorted((layout.python / "llama_cpp").rglob("*"))
        if file.is_file() and file.parent.name != "lib"
    ]
    libraries = [layout.library(name) for name in PACKAGE_LIBRARIES]
    return modules + [(f"llama_cpp/lib/{file.name}", file) for file in libraries if file.is_file()]


def metadata(layout: Layout, version: str, platform_tag: str) -> dict[str, str]:
    """The texts of the wheel: our tag beside the libraries, and what the wheel format asks for."""
    info = f"llama_cpp_python-{version}.dist-info"
    package = (layout.python / "PKG-INFO").read_text(encoding="utf-8")
    return {
        f"llama_cpp/lib/{TAG_NAME}": json.dumps({"build_key": layout.build_key}),
        f"{info}/METADATA": package.replace(
            f"\nVersion: {layout.version}\n", f"\nVersion: {version}\n", 1
        ),
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: mone-edge\nRoot-Is-Purelib: false\n"
        f"Tag: py3-none-{platform_tag}\n",
        f"{info}/licenses/LICENSE.md": (layout.python / "LICENSE.md").read_text(encoding="utf-8"),
    }


def write_file(archive: zipfile.ZipFile, name: str, content: bytes) -> str:
    """Add a file to the wheel; returns its line of RECORD."""
    archive.writestr(name, content)
    digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
    return f"{name},sha256={digest},{len(content)}\n"
