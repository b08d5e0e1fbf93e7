"""What compilers made of the GPU kernels, without a device: registers, local memory, spills, shared memory, accesses of
16 bytes and how many blocks a multiprocessor can hold; and whether that is within budgets.toml. triton_rows() and
cuda_rows() say so of every kernel and architecture that is shipped.
"""

import functools
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
import triton
from kernelcheck import representative, toolchain
from kernelcheck.launches import TARGETS, Launch

import armor

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it

HERE = Path(__file__).parent
CUDA_ARCHS = tuple(name for name, target in TARGETS.items() if target.backend == "cuda")


@dataclass(frozen=True)
class Processor:
    """What the resident blocks of a multiprocessor share, and the portions in which registers are handed out."""

    registers: int
    portion: int  # of registers, to a warp
    warps: int
    blocks: int
    shared: int  # bytes, of which every block loses `reserved`
    reserved: int
    warp_size: int = 32
    quarters: int = 4  # a warp belongs to one of them, which has its own registers


# CUDA Programming Guide, "Compute Capabilities" (technical specifications per compute capability); for CDNA 3 the
# AMDGPU backend of LLVM (512 vector registers a lane in each of four SIMDs, in portions of eight, eight waves each).
PROCESSORS = {
    "sm_80": Processor(65536, 256, 64, 32, 164 * 1024, 1024),
    "sm_90": Processor(65536, 256, 64, 32, 228 * 1024, 1024),
    "sm_100": Processor(65536, 256, 64, 32, 228 * 1024, 1024),
    "sm_120": Processor(65536, 256, 48, 24, 100 * 1024, 1024),
    "gfx942": Processor(4 * 512 * 64, 8 * 64, 32, 16, 64 * 1024, 0, warp_size=64),
}


@dataclass(frozen=True)
class Facts:
    """Of one kernel for one architecture."""

    registers: int  # per thread
    local: int  # bytes of stack and local memory per thread
    spills: int  # instructions that touch them
    shared: int  # bytes per block
    threads: int  # per block
    reads: float  # from global memory by instructions of 16 bytes or more, each counted once, and
    writes: float  # to it: in tiles, see facts_of_launch and facts_of_cubin

    def blocks(self, arch: str) -> int:
        """How many blocks are resident on a multiprocessor at once."""
        processor = PROCESSORS[arch]
        warps = -(-self.threads // processor.warp_size)
        portions = -(-self.registers * processor.warp_size // processor.portion)
        resident = processor.registers // processor.quarters // (portions * processor.portion) * processor.quarters
        shared = processor.shared // max(self.shared + processor.reserved, 1)
        return min(min(resident, processor.warps) // warps, processor.blocks, shared)

    def warps(self, arch: str) -> int:
        return self.blocks(arch) * -(-self.threads // PROCESSORS[arch].warp_size)


@dataclass(frozen=True)
class Row:
    kernel: str
    variant: str
    arch: str
    facts: Facts
    violations: list[str]


def check(facts: Facts, kernel: str, arch: str) -> list[str]:
    """What is not within the budget of a kernel (its name and variant), in words."""
    found = {**vars(facts), "blocks": facts.blocks(arch)}
    wrong = []
    for key, limit in budget(kernel, arch).items():
        least, quantity = key.startswith("min_"), key[4:]
        if found[quantity] < limit if least else found[quantity] > limit:
            bound = f"{'at least' if least else 'at most'} {limit}"
            wrong.append(f"{kernel} for {arch}: {quantity} {found[quantity]:g}, not {bound}")
    return wrong


def budget(kernel: str, arch: str) -> dict[str, int]:
    """The limits that apply: in budgets.toml later entries override earlier ones."""
    limits: dict[str, int] = {}
    for entry in budgets():
        if fnmatch(kernel, entry["kernel"]) and fnmatch(arch, entry.get("arch", "*")):
            limits |= {key: value for key, value in entry.items() if key not in ("kernel", "arch")}
    return limits


@functools.cache
def budgets() -> list[dict[str, Any]]:
    """The entries of budgets.toml."""
    return list(tomllib.loads((HERE / "budgets.toml").read_text())["budget"])


# ---- Triton --------------------------------------------------------------------------------------------------------


def triton_rows(family: str = "") -> Iterator[Row]:
    """The representative launches of every Triton kernel, or of those in armor_kernels.<family>."""
    for variant, launch, archs in representative.triton_launches(family):
        kernel = launch.kernel.__name__
        for arch in archs:
            facts = facts_of_launch(launch, arch)
            yield Row(kernel, variant, arch, facts, check(facts, f"{kernel} {variant}", arch))


def facts_of_launch(launch: Launch, arch: str) -> Facts:
    """Of the kernel that a launch compiles to. Its tile is what a program has of one of the largest tensors."""
    target = TARGETS[arch]
    made = launch.compiled(target)
    threads = made.metadata.num_warps * target.warp_size
    largest = max((t for t in launch.arguments.values() if isinstance(t, torch.Tensor)), key=torch.Tensor.numel)
    tiles = threads * 16 / (launch.constants.get("ROWS", 1) * launch.constants["BLOCK"] * largest.element_size())
    if target.backend == "hip":
        asm = made.asm["amdgcn"]
        keys = ("vgpr_count", "private_segment_fixed_size")
        registers, local = (int(re.search(rf"\.{key}:\s+(\d+)", asm)[1]) for key in keys)
        spills = len(re.findall(r"^\s+scratch_(?:load|store)", asm, re.M))
        reads, writes = (len(re.findall(rf"(?:buffer|global)_{access}_dwordx4", asm)) for access in ("load", "store"))
    else:
        registers, local, _ = _usage(made.asm["cubin"])[made.metadata.name]
        spills = _spills(_disassembled(made.asm["cubin"])) if local else 0  # takes as long as to compile
        reads, writes = (_vectors(made.asm["ptx"], access) for access in ("ld", "st"))  # ptxas leaves them as they are
    return Facts(registers, local, spills, made.metadata.shared, threads, reads * tiles, writes * tiles)


def _vectors(ptx: str, access: str) -> float:
    """How many times 16 bytes a thread loads from or stores to global memory by instructions of that size or more."""
    found = re.findall(rf"{access}\.global[.\w:]*\.v(\d)\.[bf](\d+)", ptx)
    sizes = (int(count) * int(bits) / 128 for count, bits in found)
    return sum(size for size in sizes if size >= 1)


# ---- CUDA ----------------------------------------------------------------------------------------------------------


def cuda_rows(family: str = "", archs: Iterable[str] = CUDA_ARCHS) -> Iterator[Row]:
    """Every kernel of the CUDA module, or those whose names begin with that of csrc/cuda/<family>.cu."""
    threads = int(re.search(r"kBlock = (\d+)", (toolchain.CSRC / "cuda/dual.cuh").read_text())[1])
    for arch in archs:
        for cubin in _cubins(arch, family):
            for name, facts in sorted(facts_of_cubin(cubin, arch, threads).items()):
                kernel, _, variant = name.partition("<")
                if kernel.startswith(family):
                    yield Row(kernel, f"<{variant}", arch, facts, check(facts, name, arch))


def _cubins(arch: str, family: str) -> list[bytes]:
    """Out of the module that setup.py built, if that was built for the architecture and is newer than its sources, else
    compiled here, which takes more than a minute for rowloss.cu."""
    module = Path(armor.__file__).with_name("_C_cuda.abi3.so")
    sources = [path for path in toolchain.CSRC.rglob("*") if path.is_file()]
    if module.exists() and module.stat().st_mtime > max(path.stat().st_mtime for path in sources):
        with tempfile.TemporaryDirectory() as folder:
            _tool("cuobjdump", "-xelf", f"{arch}.cubin", module, cwd=folder)
            if found := sorted(Path(folder).glob("*.cubin")):
                return [path.read_bytes() for path in found]
    kernels = toolchain.CSRC.glob(f"cuda/{family or '*'}.cu")
    return [toolchain.cubin(path, int(arch.removeprefix("sm_"))).read_bytes() for path in sorted(kernels)]


def facts_of_cubin(cubin: bytes, arch: str, threads: int) -> dict[str, Facts]:
    """By name of the kernel. Its tile is 16 bytes for every thread."""
    code = _disassembled(cubin)
    bodies = dict(re.findall(r"^\.text\.(\S+):\n(.*?)(?=^\.text\.|\Z)", code, re.M | re.S))
    found = {}
    for name, (registers, local, shared) in _usage(cubin).items():
        if shared and arch != "sm_80":  # from compute capability 9.0 on what every block loses is counted in
            shared -= PROCESSORS[arch].reserved
        body = bodies[name]
        reads, writes = (len(re.findall(rf"\s{access}G?\.E\.[\w.]*128\b", body)) for access in ("LD", "ST"))
        found[readable(name)] = Facts(registers, local, _spills(body), shared, threads, reads, writes)
    return found


# ---- NVIDIA's binaries ---------------------------------------------------------------------------------------------


def _usage(cubin: bytes) -> dict[str, tuple[int, int, int]]:
    """Registers, bytes of local memory and bytes of shared memory, by mangled name."""
    pattern = r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)"
    found = re.findall(pattern, _said_of(cubin, "cuobjdump", "-res-usage"))
    return {
        name: (int(registers), int(stack) + int(local), int(shared)) for name, registers, stack, shared, local in found
    }


def _disassembled(cubin: bytes) -> str:
    return _said_of(cubin, "nvdisasm", "-c")


def _spills(code: str) -> int:
    return len(re.findall(r"\s(?:LDL|STL)\b", code))


def _said_of(cubin: bytes, tool: str, *options: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return _tool(tool, *options, file.name)


def readable(mangled: str) -> str:
    """rowloss<float, float> for a C++ kernel, and the name of a Triton kernel as it is."""
    if not mangled.startswith("_Z"):
        return mangled
    name = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=True).stdout
    return re.sub(r"\barmor::(?:cuda::)?", "", name.split("(")[0].removeprefix("void "))


def _tool(name: str, *arguments: Any, cwd: str | None = None) -> str:
    """What a tool says that Triton brings along for NVIDIA's binaries."""
    path = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True, cwd=cwd).stdout
