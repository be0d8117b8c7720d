"""Devices, number formats and random numbers, for all scripts."""

import os
import sys
from contextlib import nullcontext
from pathlib import Path

import torch

from common.errors import UserError, first_line, is_out_of_memory
from common.parallel import processes


def pick_device(name: str = "auto") -> torch.device:
    """``auto`` is the first CUDA GPU, if it works, else the CPU. Raises UserError for a device that is not there, or
    does not work.

    Of several processes (common/parallel.py) each has the GPU of its number. Float32 convolutions on it are computed
    in float32 from here on, not in TensorFloat32, cuDNN's default, which keeps 10 of 23 bits.
    """
    torch.backends.cudnn.allow_tf32 = False
    auto = name == "auto"
    if auto:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.partition(":")[0] == "cuda" and processes() > 1:
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name}: unknown; use auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: {torch.cuda.device_count()} CUDA GPUs here; use --device cpu")
    fault = gpu_fault(device) if device.type == "cuda" else ""
    if fault and not (auto and processes() == 1):
        raise UserError(f"--device {name}: does not work ({fault}); use --device cpu")
    if fault:
        print(f"note: the GPU does not work ({fault}); the CPU computes", file=sys.stderr)
        return torch.device("cpu")
    return device


def gpu_fault(device: torch.device) -> str:
    """Why a GPU cannot compute (too old for this PyTorch, used by others alone, broken driver), in a line, or ''."""
    try:
        (torch.ones(1, device=device) + 1).item()
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        return first_line(error)
    return ""


def cpu_info() -> str:
    """What Linux tells of the processor, or '' where it tells nothing."""
    try:
        return Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""


def bfloat16_pays(device: torch.device) -> bool:
    """Whether this device multiplies bfloat16 faster than float32: GPUs since Ampere, processors with AMX, and AMD's
    with AVX-512 BF16. On an Intel Xeon with the latter alone the GANs and the UNet took 1.1 to 1.5 times as long."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    info = cpu_info()
    return "amx_bf16" in info or ("avx512_bf16" in info and "AuthenticAMD" in info)


def device_and_format(device: str, bf16: bool | None) -> tuple[torch.device, bool]:
    """The device that --device names, and whether to compute in bfloat16: what --bf16 says, else if it pays."""
    picked = pick_device(device)
    return picked, bfloat16_pays(picked) if bf16 is None else bf16


def hardware(device: torch.device) -> str:
    """What computes: the GPU's name, or the processor's and the number of threads."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        return f"{processes()} x {name}" if processes() > 1 else name
    named = (line.partition(":")[2].strip() for line in cpu_info().splitlines() if line.startswith("model name"))
    name = next(named, "CPU")
    return f"{name}, {torch.get_num_threads()} threads"


def autocast(device: torch.device, enabled: bool):
    """bfloat16 autocast, or nothing."""
    return torch.autocast(device.type, torch.bfloat16) if enabled else nullcontext()


def step_generator(device: torch.device, *seeds: int) -> torch.Generator:
    """A generator that depends on ``seeds`` alone, e.g. (training seed, step).

    Training draws every random number of step s from the generator of (seed, s). Resuming then
    needs no generator state, and what happens between steps cannot disturb the sequence.
    """
    mixed = 0x9E3779B97F4A7C15
    for seed in seeds:  # splitmix64 finaliser: nearby seeds give unrelated streams
        mixed = (mixed + seed + 0x9E3779B97F4A7C15) % 2**64
        mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB % 2**64
        mixed ^= mixed >> 31
    return torch.Generator(device).manual_seed(mixed >> 1)


def noise(seed: int, indices: range | list[int], *shape: int) -> torch.Tensor:
    """Standard normal noise (len(indices), *shape) on the CPU. Row i depends on (seed, indices[i]) alone,
    so a sample never depends on batch size, device or how many others are drawn."""
    cpu = torch.device("cpu")
    return torch.stack([torch.randn(*shape, generator=step_generator(cpu, seed, i)) for i in indices])
