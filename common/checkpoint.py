"""The two files a network is kept in: weights to use, and a training state to go on from.

Weights are safetensors, float16, with everything needed to rebuild the network in the metadata under
the key ``card`` (JSON: model, config, command, data, steps, scores). ``SHA256SUMS`` beside them (the
format of ``sha256sum``) is verified on load. A training state is a ``torch.save`` file read with
``weights_only=True``.
"""

import hashlib
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from common.errors import UserError, is_out_of_memory
from common.files import atomic

CHECKSUMS = "SHA256SUMS"
# what torch.load raises for files that are damaged or no torch.save files
UNPICKLING = (RuntimeError, EOFError, pickle.UnpicklingError, ValueError, LookupError, TypeError, AttributeError)
RESTORE = "restore it (git checkout), or give another file"


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


def write_checksum(path: Path, digest: str | None) -> None:
    """Set the line of a file, or remove it."""
    sums = read_checksums(path.parent) | {path.name: digest}
    with atomic(path.parent / CHECKSUMS) as temporary:
        temporary.write_text(
            "".join(f"{sums[name]}  {name}\n" for name in sorted(sums) if sums[name]), encoding="utf-8"
        )


def save_weights(path: Path, state: dict[str, Tensor], card: dict) -> None:
    """Write a state dict as float16 (integer tensors as they are) with its card, and its checksum beside it."""
    tensors = {k: (v.half() if v.is_floating_point() else v).cpu().contiguous() for k, v in state.items()}
    data = save_tensors(tensors, metadata={"card": json.dumps(card)})
    path = Path(path)
    if path.name in read_checksums(path.parent):
        write_checksum(path, None)  # so that a stop in between leaves weights without a checksum, not with a wrong one
    with atomic(path) as temporary:
        temporary.write_bytes(data)
    write_checksum(path, hashlib.sha256(data).hexdigest())


def load_weights(path: str | Path) -> tuple[dict[str, Tensor], dict]:
    """(state dict in float32, card). Raises UserError when the file is missing, damaged or not ours."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such weight file; {RESTORE}")
    data = path.read_bytes()
    expected = read_checksums(path.parent).get(path.name)
    if expected is not None and hashlib.sha256(data).hexdigest() != expected:
        sums = path.parent / CHECKSUMS
        raise UserError(f"{path}: damaged, or not the weights of {sums}; {RESTORE}, or remove its line from {sums}")
    try:
        tensors = load_tensors(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])  # the safetensors format
        card = json.loads(header["__metadata__"]["card"])
    except (SafetensorError, KeyError, ValueError):
        raise UserError(f"{path}: not a weight file of this repository, or cut short; {RESTORE}") from None
    return {k: v.float() if v.is_floating_point() else v for k, v in tensors.items()}, card


def load_network(path: str | Path, kinds: dict[str, Callable[..., nn.Module]]) -> tuple[nn.Module, dict]:
    """(network in eval mode on the CPU, card) of a weight file; ``kinds`` maps the card's ``model`` to a class.

    Raises UserError when the file is missing, damaged, or holds another kind of network.
    """
    state, card = load_weights(path)
    kind = card.get("model")
    if kind not in kinds:
        raise UserError(f"{path}: holds weights of {kind!r}; this script needs one of {', '.join(kinds)}")
    try:
        network = kinds[kind](**card["config"])
        network.load_state_dict(state)
    except (KeyError, TypeError, RuntimeError):
        raise UserError(f"{path}: its tensors do not fit the network {kind!r}; {RESTORE}") from None
    return network.eval(), card


def history(card: dict) -> list[dict]:
    """The runs that led to a weight file, oldest first: command, commit, steps, minutes, hardware of each."""
    return [*card.get("before", []), {k: card[k] for k in ("command", "commit", "steps", "minutes", "hardware")}]


def save_state(path: Path, state: dict) -> None:
    """Write a training state (tensors, numbers, strings, nested) in one rename."""
    with atomic(path) as temporary, temporary.open("wb") as f:  # given a path, torch raises no OSError at all
        try:
            torch.save(state, f)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):  # a full disk, as torch's zip writer hides it
                raise error.__context__ from None
            raise


def load_state(path: Path) -> dict:
    """Read a training state onto the CPU. Raises UserError when it is missing or damaged."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no training state here; the run never reached its first save, start a new one")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except UNPICKLING as error:
        if is_out_of_memory(error):
            raise
        raise UserError(f"{path}: damaged training state; start a new run") from None
