"""What can be built: machines to build for, what to compute on, and what each needs here.

Data only: cmake options and the Debian packages of programs and headers. Knows nothing of folders
and runs nothing. The options of the native CPU build are `layout.CMAKE_OPTIONS` alone.
"""

import platform
from collections.abc import Mapping
from dataclasses import dataclass, field

from mone_edge.errors import UsageError

ARM_BASE = "armv8.2-a+dotprod+fp16"
ARM_I8MM = "armv8.2-a+dotprod+fp16+i8mm"
# the first Android whose loader finds libraries beside a program, as it does on Linux, is 24
ANDROID_API = "android-28"
NDK_TOOLCHAIN = "build/cmake/android.toolchain.cmake"


@dataclass(frozen=True)
class Part:
    """A target or a backend.

    Attributes:
        options: of cmake, beside those of every build.
        programs: needed on the path, each with its Debian package.
        headers: needed by the compiler, each with its Debian package.
        library: of ggml, that the build makes beside the others.
    """

    options: Mapping[str, str] = field(default_factory=dict)
    programs: Mapping[str, str] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    library: str | None = None


def _arm(architecture: str) -> dict[str, str]:
    # a build for many machines: no look at this one's processor, no OpenMP library to bring along
    return {"GGML_NATIVE": "OFF", "GGML_OPENMP": "OFF", "GGML_CPU_ARM_ARCH": architecture}


def _debian_arm(architecture: str) -> Part:
    prefix = "aarch64-linux-gnu"
    options = {
        **_arm(architecture),
        "CMAKE_SYSTEM_NAME": "Linux",
        "CMAKE_SYSTEM_PROCESSOR": "aarch64",
        "CMAKE_C_COMPILER": f"{prefix}-gcc",
        "CMAKE_CXX_COMPILER": f"{prefix}-g++",
        # nothing of this machine may be found in place of the target's
        "CMAKE_FIND_ROOT_PATH": f"/usr/{prefix}",
        "CMAKE_FIND_ROOT_PATH_MODE_PROGRAM": "NEVER",
        "CMAKE_FIND_ROOT_PATH_MODE_LIBRARY": "ONLY",
        "CMAKE_FIND_ROOT_PATH_MODE_INCLUDE": "ONLY",
        "CMAKE_FIND_ROOT_PATH_MODE_PACKAGE": "ONLY",
    }
    programs = {f"{prefix}-gcc": f"gcc-{prefix}", f"{prefix}-g++": f"g++-{prefix}"}
    return Part(options, programs)


def _android(architecture: str) -> Part:
    return Part(
        {
            **_arm(architecture),
            "ANDROID_ABI": "arm64-v8a",
            "ANDROID_PLATFORM": ANDROID_API,
            "ANDROID_SUPPORT_FLEXIBLE_PAGE_SIZES": "ON",
            "GGML_LLAMAFILE": "OFF",
        }
    )


TARGETS = {
    "native": Part(),
    "aarch64-linux": _debian_arm(ARM_BASE),
    "aarch64-linux-i8mm": _debian_arm(ARM_I8MM),
    "android-arm64": _android(ARM_BASE),
    "android-arm64-i8mm": _android(ARM_I8MM),
}

BACKENDS = {
    "cpu": Part(),
    "vulkan": Part(
        {"GGML_VULKAN": "ON"},
        {"glslc": "glslc"},
        {"vulkan/vulkan.hpp": "libvulkan-dev", "spirv/unified1/spirv.hpp": "spirv-headers"},
        "ggml-vulkan",
    ),
    "cuda": Part({"GGML_CUDA": "ON"}, {"nvcc": "nvidia-cuda-toolkit"}, {}, "ggml-cuda"),
    "metal": Part({"GGML_METAL": "ON"}, library="ggml-metal"),
}


@dataclass(frozen=True)
class Variant:
    """One way to build: for `target`, computing on `backend`."""

    target: str = "native"
    backend: str = "cpu"

    @property
    def is_native(self) -> bool:
        """Whether it runs on this machine, and so with this Python."""
        return self.target == "native"

    @property
    def needs_ndk(self) -> bool:
        """Whether the compilers are those of Android's NDK."""
        return self.target.startswith("android")

    @property
    def parts(self) -> tuple[Part, Part]:
        """The target and the backend."""
        return TARGETS[self.target], BACKENDS[self.backend]

    def options(self) -> dict[str, str]:
        """The cmake options of target and backend."""
        return {name: value for part in self.parts for name, value in part.options.items()}

    def libraries(self) -> list[str]:
        """ggml libraries beside those that every build makes."""
        return [part.library for part in self.parts if part.library]


NATIVE = Variant()


def variant_of(target: str, backend: str) -> Variant:
    """The variant of these names.

    Raises:
        UsageError: there is no such target or backend, or they do not go together.
    """
    if target not in TARGETS:
        raise UsageError(f"no target {target!r}; there are: {', '.join(TARGETS)}")
    if backend not in BACKENDS:
        raise UsageError(f"no backend {backend!r}; there are: {', '.join(BACKENDS)}")
    if target != "native" and backend != "cpu":
        raise UsageError(f"backend {backend} is for the native target only, not {target}")
    if backend == "metal" and platform.system() != "Darwin":
        raise UsageError(f"backend metal is for Macs, and this is {platform.system()}")
    return Variant(target, backend)
