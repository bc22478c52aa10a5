"""Fetching, patching, installing and finding, without compiling anything."""

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from pathlib import Path

import pytest

from mone_edge import runtime
from mone_edge.errors import MoneEdgeError, RuntimeMissing, UsageError
from mone_edge.runtime import compile as compiling
from mone_edge.runtime import fetch, install, layout, source, targets, toolchain, upstream

PATCH = """--- a/file.txt
+++ b/file.txt
@@ -1 +1 @@
-old
+new
"""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    monkeypatch.setenv("MONE_EDGE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def make_layout(root: Path) -> layout.Layout:
    return layout.Layout("0.0.1", "key", root)


def add_file(tar: tarfile.TarFile, name: str, content: bytes = b"x") -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def test_series_names_every_patch() -> None:
    files = upstream.patch_files()
    assert files == sorted(upstream.patches_dir().glob("*.patch"))
    assert all("Subject: [PATCH]" in file.read_text(encoding="utf-8") for file in files)


def test_key_follows_the_patches(monkeypatch: pytest.MonkeyPatch) -> None:
    before = layout.layout_of(targets.NATIVE).build_key
    monkeypatch.setattr(upstream, "patch_files", list)
    assert layout.layout_of(targets.NATIVE).build_key != before


def test_nothing_built(cache: Path) -> None:
    found = runtime.info()
    assert not found.built and found.tools == {} and not found.root.exists()
    for ask in (runtime.source_tree, runtime.ggml_library, runtime.llama_library):
        with pytest.raises(RuntimeMissing, match="mone-edge runtime build"):
            ask()
    with pytest.raises(RuntimeMissing, match="mone-edge runtime build"):
        runtime.tool("llama-bench")
    with pytest.raises(MoneEdgeError, match="no tool 'llama-nothing'"):
        runtime.tool("llama-nothing")


@pytest.mark.parametrize(
    "wrong",
    [
        {"backend": "abacus"},
        {"target": "abacus"},
        {"target": "aarch64-linux", "backend": "vulkan"},
        {"backend": "metal"},
        {"jobs": 0},
    ],
    ids=str,
)
def test_unsupported(
    cache: Path, wrong: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(targets.platform, "system", lambda: "Linux")
    with pytest.raises(UsageError):
        runtime.build(**wrong)  # type: ignore[arg-type]
    assert not cache.exists()


def test_a_build_that_cannot_be_made_anew_stays(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = layout.layout_of(targets.NATIVE)
    place.root.mkdir(parents=True)
    place.marker.write_text('{"files": []}', encoding="utf-8")

    def fails(*_: object, **__: object) -> None:
        assert step == "find_toolchain" or not place.root.exists()
        if step == "make_source":
            place.root.mkdir()
            place.log.write_text("why", encoding="utf-8")
        raise MoneEdgeError("no luck")

    monkeypatch.setattr(runtime, "find_toolchain", lambda *_, **__: None)
    for step in ("make_source", "find_toolchain"):
        monkeypatch.setattr(runtime, step, fails)
        with pytest.raises(MoneEdgeError, match="no luck"):
            runtime.build(force=True)
        assert place.is_built() and place.log.read_text(encoding="utf-8") == "why"
        assert not list(place.root.parent.glob(".*.old"))
    place.root.rename(runtime._aside(place))  # killed, without time to put it back
    with pytest.raises(MoneEdgeError, match="no luck"):
        runtime.build(force=True)
    assert place.is_built()


def test_offline_without_source(cache: Path) -> None:
    for ask in (lambda: runtime.build(offline=True), lambda: runtime.prepare_source(offline=True)):
        with pytest.raises(MoneEdgeError, match=r"offline, and llama_cpp_python.* put the file at"):
            ask()


def test_damaged_download_is_not_used(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pip_download(pin: upstream.Upstream, folder: Path) -> Path:
        file = folder / pin.sdist_name
        file.write_bytes(b"something else")
        return file

    monkeypatch.setattr(fetch, "pip_download", pip_download)
    with pytest.raises(MoneEdgeError, match=r"expected 832db.*not used"):
        fetch.fetch_sdist(upstream.read_upstream(), offline=False)
    assert list((cache / "runtime").iterdir()) == []


def test_pip_failure_is_one_line() -> None:
    with pytest.raises(MoneEdgeError) as caught:
        fetch.run_pip(["install", "--no-index", "no-such-package-at-all"], "cannot install")
    assert str(caught.value).startswith("cannot install: No matching distribution")
    assert "\n" not in str(caught.value)


def test_extract_takes_the_parts_and_drops_the_top_folder(tmp_path: Path) -> None:
    archive = tmp_path / "a.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        for name in ("top/tree/a/b.txt", "top/other.txt", "top/PKG-INFO"):
            add_file(tar, name)
    source.extract(archive, tmp_path / "out", ("tree", "PKG-INFO"))
    made = sorted(p.relative_to(tmp_path / "out").as_posix() for p in tmp_path.glob("out/**/*.*"))
    assert made == ["tree/a/b.txt"] and (tmp_path / "out/PKG-INFO").is_file()
    with pytest.raises(MoneEdgeError, match="has no missing"):
        source.extract(archive, tmp_path / "out", ("missing",))


def test_extract_refuses_to_leave_its_folder(tmp_path: Path) -> None:
    archive = tmp_path / "a.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        add_file(tar, "top/tree/../../../outside.txt")
    with pytest.raises(MoneEdgeError, match="cannot extract"):
        source.extract(archive, tmp_path / "in" / "out", ("tree",))
    assert not (tmp_path / "outside.txt").exists()


def test_extract_of_a_broken_archive(tmp_path: Path) -> None:
    archive = tmp_path / "a.tar.gz"
    archive.write_bytes(b"not an archive")
    with pytest.raises(MoneEdgeError, match="cannot extract"):
        source.extract(archive, tmp_path / "out", ("tree",))


@pytest.mark.parametrize("program", ["git", "patch"])
@pytest.mark.parametrize("in_repository", [False, True])
def test_patches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str, in_repository: bool
) -> None:
    """Also inside of somebody's repository, where a bare "git apply" silently does nothing."""
    if in_repository:
        subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    which = toolchain.shutil.which
    monkeypatch.setattr(
        source.shutil, "which", lambda name: which(name) if name == program else None
    )
    tree = tmp_path / "deep" / "tree"
    tree.mkdir(parents=True)
    (tree / "file.txt").write_text("old\n", encoding="utf-8")
    patch = tmp_path / "0001.patch"
    patch.write_text(PATCH, encoding="utf-8")
    source.apply_patches(tree, [patch])
    assert (tree / "file.txt").read_text(encoding="utf-8") == "new\n"
    with pytest.raises(MoneEdgeError, match=r"0001\.patch does not apply"):
        source.apply_patches(tree, [patch])


def test_all_missing_programs_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchain.shutil, "which", lambda *_, **__: None)
    with pytest.raises(MoneEdgeError, match="sudo apt install cmake gcc g\\+\\+ make"):
        toolchain.find_toolchain()


def make_ndk(folder: Path) -> Path:
    """What is looked at of Android's NDK."""
    file = folder / targets.NDK_TOOLCHAIN
    file.parent.mkdir(parents=True)
    file.touch()
    return folder


def test_ndk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An Android build names what it needs; the option goes before the environment."""
    android = targets.Variant("android-arm64")
    for name in toolchain.NDK_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(MoneEdgeError, match=r"ndk/downloads.*--ndk or ANDROID_NDK"):
        toolchain.find_toolchain(android)
    monkeypatch.setenv("ANDROID_NDK", str(tmp_path))
    with pytest.raises(MoneEdgeError, match=r"is not an Android NDK: it has no build/cmake"):
        toolchain.find_toolchain(android)
    found = toolchain.find_toolchain(android, ndk=make_ndk(tmp_path / "ndk"))
    command = compiling.configure_command(layout.layout_of(android), found)
    assert f"-DCMAKE_TOOLCHAIN_FILE={tmp_path / 'ndk' / targets.NDK_TOOLCHAIN}" in command
    assert {"-DANDROID_ABI=arm64-v8a", "-DGGML_NATIVE=OFF", "-DGGML_OPENMP=OFF"} <= set(command)


def test_missing_cross_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    which = toolchain.shutil.which
    monkeypatch.setattr(
        toolchain.shutil,
        "which",
        lambda name, **k: None if "aarch64" in name else which(name, **k),
    )
    with pytest.raises(
        MoneEdgeError, match=r"aarch64-linux-gnu-g\+\+ not found.*apt install gcc-aa"
    ):
        toolchain.find_toolchain(targets.Variant("aarch64-linux"))


def test_missing_headers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchain, "has_header", lambda name: False)
    with pytest.raises(MoneEdgeError, match="libvulkan-dev spirv-headers"):
        toolchain.find_toolchain(targets.Variant(backend="vulkan"))


def test_header_lookup() -> None:
    assert toolchain.has_header("cstddef")
    assert not toolchain.has_header("no/such/header.hpp")


def test_variants_have_builds_of_their_own() -> None:
    variants = [targets.Variant(target) for target in targets.TARGETS]
    variants += [targets.Variant(backend=backend) for backend in targets.BACKENDS]
    layouts = {variant: layout.layout_of(variant) for variant in variants}
    assert len({place.build_key for place in layouts.values()}) == len(layouts)
    cross = layouts[targets.Variant("aarch64-linux")]
    assert cross.library("llama").name == "libllama.so"


def test_options_of_a_mac(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its loader's name for a library's folder; Metal only where it is asked for."""
    linux = layout.cmake_options(targets.NATIVE)
    monkeypatch.setattr(layout.platform, "system", lambda: "Darwin")
    mac = layout.cmake_options(targets.NATIVE)
    assert linux.items() - mac.items() == {("CMAKE_INSTALL_RPATH", "$ORIGIN;$ORIGIN/../lib")}
    assert (mac["CMAKE_INSTALL_RPATH"].count("@loader_path"), mac["GGML_METAL"]) == (2, "OFF")
    metal = targets.variant_of("native", "metal")
    assert layout.cmake_options(metal)["GGML_METAL"] == "ON"
    assert layout.layout_of(metal).library("ggml-metal").name == "libggml-metal.dylib"
    assert layout.cmake_options(targets.Variant("aarch64-linux")).get("GGML_METAL") is None


def test_the_installed_backend_is_the_one_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    vulkan = layout.layout_of(targets.Variant(backend="vulkan"))
    for key, backend in ((vulkan.build_key, "vulkan"), ("another", "cpu"), (None, "cpu")):
        monkeypatch.setattr(runtime, "installed_key", lambda key=key: key)
        assert runtime.info().backend == backend
    assert runtime.info(backend="cpu").backend == "cpu"


def test_cross_build_leaves_what_is_to_be_copied(tmp_path: Path) -> None:
    place = layout.Layout("0.0.1", "key", tmp_path, targets.Variant("aarch64-linux"))
    for folder in (place.source, place.python, place.bin, place.lib):
        folder.mkdir()
        (folder / "file").touch()
    runtime.finish(place)
    assert place.is_built()
    assert {path.name for path in tmp_path.iterdir()} == {"bin", "lib", "built.json"}


@pytest.mark.parametrize("name", ["out", "out.tar.gz"])
def test_exported_source(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = tmp_path / "tree"
    (tree / "src").mkdir(parents=True)
    (tree / "src" / "a.cpp").write_text("int a;", encoding="utf-8")
    out = source.export_tree(tree, tmp_path / "new" / name, force=False)
    if out.is_file():
        with tarfile.open(out) as tar:
            assert "out/src/a.cpp" in tar.getnames()
    else:
        assert (out / "src" / "a.cpp").read_text(encoding="utf-8") == "int a;"
    with pytest.raises(MoneEdgeError, match=r"exists; name another, or replace it with --force"):
        source.export_tree(tree, out, force=False)
    assert source.export_tree(tree, out, force=True) == out
    assert [path.name for path in out.parent.iterdir()] == [name]
    shutil.copytree(tree, tmp_path / "mine")
    (tmp_path / "mine" / "src" / "patch").touch()
    (tmp_path / "file").touch()
    for wrong in ("mine", "no/../mine", "file"):
        with pytest.raises(MoneEdgeError, match="left alone"):
            source.export_tree(tree, tmp_path / wrong, force=True)
        assert (tmp_path / "file").exists() and (tmp_path / "mine" / "src" / "patch").exists()

    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(source.tarfile.TarFile, "add", stopped)
    monkeypatch.setattr(source.shutil, "copytree", stopped)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(KeyboardInterrupt):
        source.export_tree(tree, tmp_path / "deep" / "er" / name, force=False)
    assert sorted(tmp_path.rglob("*")) == before


def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 1 << 29})
    monkeypatch.setattr(toolchain.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(MoneEdgeError, match=r"0\.5 GiB free, a build needs 2"):
        toolchain.require_space(tmp_path)


def test_failed_step_names_its_log(tmp_path: Path) -> None:
    place = make_layout(tmp_path)
    command = [sys.executable, "-c", "print('[ 42%] x'); print('boom'); raise SystemExit(7)"]
    said: list[str] = []
    with (
        place.log.open("w", encoding="utf-8") as log,
        pytest.raises(MoneEdgeError) as caught,
    ):
        compiling.run_step(command, place, log.write, said.append)
    assert "exit code 7" in str(caught.value) and "boom" in str(caught.value)
    assert str(place.log) in str(caught.value)
    assert "boom" in place.log.read_text(encoding="utf-8")
    assert said == ["compiling llama.cpp 42%"]


def test_an_interrupt_ends_the_compilers(tmp_path: Path) -> None:
    place = make_layout(tmp_path)
    command = ["sh", "-c", f"sleep 300 & echo $! > {tmp_path / 'compiler'}; echo '[ 1%] x'; wait"]

    def stop(_: str) -> None:
        raise KeyboardInterrupt

    with place.log.open("w", encoding="utf-8") as log, pytest.raises(KeyboardInterrupt):
        compiling.run_step(command, place, log.write, stop)
    compiler = int((tmp_path / "compiler").read_text(encoding="utf-8"))
    for _ in range(500):
        if not is_running(compiler):
            return
        time.sleep(0.02)
    raise AssertionError("it goes on")


def is_running(process: int) -> bool:
    """Whether there is such a process, but for one that nobody has asked how it ended."""
    found = subprocess.run(
        ["ps", "-o", "stat=", "-p", str(process)], capture_output=True, text=True, check=False
    )
    return found.stdout.strip()[:1] not in ("", "Z")


def test_half_a_build_is_no_build(tmp_path: Path) -> None:
    place = make_layout(tmp_path)
    assert not place.is_built()
    place.marker.write_text(json.dumps({"files": ["bin/tool"]}), encoding="utf-8")
    assert not place.is_built()
    place.bin.mkdir()
    (place.bin / "tool").touch()
    assert place.is_built()
    place.marker.write_text("{", encoding="utf-8")
    assert not place.is_built()


def test_lock_keeps_the_second_waiting(cache: Path) -> None:
    order: list[str] = []
    waiting = threading.Event()

    def second() -> None:
        with layout.locked("key", waiting.set):
            order.append("second")

    with layout.locked("key", lambda: None):
        thread = threading.Thread(target=second)
        thread.start()
        assert waiting.wait(10)
        order.append("first")
    thread.join(10)
    assert order == ["first", "second"]


def test_unwritable_cache_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("MONE_EDGE_CACHE", str(tmp_path / "file"))
    with pytest.raises(MoneEdgeError, match="MONE_EDGE_CACHE names another folder"):
        runtime.build(offline=True)


def make_package(folder: Path, content: bytes) -> Path:
    """A package named llama_cpp whose library is `content`."""
    package = folder / "llama_cpp"
    (package / "lib").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "lib" / layout.library_name("llama")).write_bytes(content)
    return package


def test_unpatched_package_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = make_package(tmp_path, b"llama_model_n_layer\0")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "llama_cpp", raising=False)
    assert install.installed_key() is None
    with pytest.raises(RuntimeMissing, match=r"not a patched .*mone-edge runtime build"):
        runtime.load()
    library = package / "lib" / layout.library_name("llama")
    library.write_bytes(b"\0" + install.PATCH_SYMBOL.encode() + b"\0")
    assert install.exports_patch(library) and install.installed_key() is None
    tag = package / "lib" / install.TAG_NAME
    tag.write_text(json.dumps({"build_key": "abc"}), encoding="utf-8")
    assert install.installed_key() == "abc"


def test_wheel(tmp_path: Path) -> None:
    """What goes in comes out where an import looks for it, with a correct RECORD."""
    place = make_layout(tmp_path)
    make_package(place.python, b"")
    (place.python / "PKG-INFO").write_text("Name: x\nVersion: 0.0.1\nA: b\n", encoding="utf-8")
    (place.python / "LICENSE.md").write_text("MIT", encoding="utf-8")
    place.lib.mkdir()
    for name in install.PACKAGE_LIBRARIES:
        place.library(name).write_bytes(name.encode())
    with zipfile.ZipFile(install.make_wheel(place)) as wheel:
        names = set(wheel.namelist())
        library = f"llama_cpp/lib/{layout.library_name('llama')}"
        assert wheel.read(library) == b"llama"
        assert b"\nVersion: 0.0.1+mone.key\n" in wheel.read(
            "llama_cpp_python-0.0.1+mone.key.dist-info/METADATA"
        )
        record = wheel.read("llama_cpp_python-0.0.1+mone.key.dist-info/RECORD").decode()
    assert {line.split(",")[0] for line in record.splitlines()} == names
    assert len(record.splitlines()) == len(wheel.namelist())
    assert f"{library},sha256=" in record


def test_second_build_does_nothing(built_runtime: runtime.RuntimeInfo) -> None:
    said: list[str] = []
    assert runtime.build(offline=True, progress=said.append) == built_runtime
    assert said == []
    assert built_runtime.built and built_runtime.patched and built_runtime.installed
    assert (runtime.source_tree() / "conversion").is_dir()
    assert (runtime.source_tree() / "gguf-py").is_dir()


def test_tools_start_from_anywhere(built_runtime: runtime.RuntimeInfo, tmp_path: Path) -> None:
    """The libraries are found by the tools' own place, also when that moves."""
    moved = tmp_path / "moved"
    moved.mkdir()
    for part in ("bin", "lib"):
        (moved / part).symlink_to(built_runtime.root / part)
    environment = {k: v for k, v in os.environ.items() if k != "LD_LIBRARY_PATH"}
    for name in built_runtime.tools:
        command = [str(moved / "bin" / name), "--help"]
        done = subprocess.run(command, cwd="/", env=environment, capture_output=True, check=False)
        assert b"usage" in (done.stdout + done.stderr).lower(), name


def test_digest_of_file(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"abc")
    assert fetch.sha256_of(tmp_path / "f") == hashlib.sha256(b"abc").hexdigest()
