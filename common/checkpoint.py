"""The two files a network is kept in: weights to use, and a training state to go on from.

Weights are safetensors, float16, with everything needed to rebuild the network in the metadata under
the key ``card`` (JSON: model, config, command, data, steps, scores). ``SHA256SUMS`` beside them (the
format of ``sha256sum``) is verified on load. A training state is a ``torch.save`` file read with
``weights_only=True``.
"""

import hashlib
import json
import pickle
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from common.errors import UserError
from common.files import atomic

CHECKSUMS = "SHA256SUMS"


def read_checksums(folder: Path) -> dict[str, str]:
    """File name -> SHA-256 of every line in the folder's SHA256SUMS; empty without one."""
    path = folder / CHECKSUMS
    if not path.is_file():
        return {}
    sums = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        digest, _, name = line.partition("  ")
        sums[name.strip()] = digest.strip()
    return sums


def write_checksum(path: Path, digest: str) -> None:
    sums = read_checksums(path.parent) | {path.name: digest}
    with atomic(path.parent / CHECKSUMS) as temporary:
        temporary.write_text("".join(f"{sums[name]}  {name}\n" for name in sorted(sums)), encoding="utf-8")


def save_weights(path: Path, state: dict[str, Tensor], card: dict) -> None:
    """Write a state dict as float16 (integer tensors as they are) with its card, and its checksum beside it."""
    tensors = {k: (v.half() if v.is_floating_point() else v).cpu().contiguous() for k, v in state.items()}
    data = save_tensors(tensors, metadata={"card": json.dumps(card)})
    with atomic(path) as temporary:
        temporary.write_bytes(data)
    write_checksum(Path(path), hashlib.sha256(data).hexdigest())


def load_weights(path: Path) -> tuple[dict[str, Tensor], dict]:
    """(state dict in float32, card). Raises UserError when the file is missing, damaged or not ours."""
    path = Path(path)
    restore = "restore it (git checkout), or pass another file"
    if not path.is_file():
        raise UserError(f"{path}: no such weight file; {restore}")
    data = path.read_bytes()
    expected = read_checksums(path.parent).get(path.name)
    if expected is not None and hashlib.sha256(data).hexdigest() != expected:
        raise UserError(f"{path}: damaged, it does not match its line in {path.parent / CHECKSUMS}; {restore}")
    try:
        tensors = load_tensors(data)
        with safe_open(path, "pt") as f:
            card = json.loads((f.metadata() or {})["card"])
    except (SafetensorError, KeyError, ValueError) as error:
        raise UserError(f"{path}: not a weight file of this repository ({error}); {restore}") from None
    return {k: v.float() if v.is_floating_point() else v for k, v in tensors.items()}, card


def save_state(path: Path, state: dict) -> None:
    """Write a training state (tensors, numbers, strings, nested) in one rename."""
    with atomic(path) as temporary:
        torch.save(state, temporary)


def load_state(path: Path, device: torch.device) -> dict:
    """Read a training state onto ``device``. Raises UserError when it is missing or damaged."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no training state here; the run never reached its first save, start a new one")
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError, ValueError):
        raise UserError(f"{path}: damaged training state; start a new run") from None
