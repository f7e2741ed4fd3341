"""State dicts from files: read without running code from them, filled in with an error that names what is wrong."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from protocol.errors import InputError

# Where training programs keep the state dict among other things.
_WITHIN = ("state_dict", "model_state_dict", "model")


def read_state(path: str, field: str) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, or of what ``torch.save`` wrote of a state dict, also of one within a
    training checkpoint. Raises InputError."""
    try:
        if Path(path).suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise InputError(f"{field} {path}: cannot be read: there is no such file") from error
    except Exception as error:
        if type(error).__name__ == "UnpicklingError":
            # What torch advises here is to run whatever code is in the file.
            raise InputError(
                f"{field} {path}: cannot be read: it is damaged, or holds more than tensors (a whole model?); save its "
                "state dict, torch.save(model.state_dict(), FILE), or a .safetensors file"
            ) from error
        # torch.load reports a broken file as any of half a dozen unrelated exception types.
        kind = "not a safetensors file" if isinstance(error, SafetensorError) else type(error).__name__
        text = str(error).splitlines()[0] if str(error) else ""
        raise InputError(f"{field} {path}: cannot be read ({kind}: {text})") from error
    if isinstance(state, dict):
        state = next((inner for key in _WITHIN if isinstance(inner := state.get(key), dict)), state)
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise InputError(f"{field} {path}: holds no state dict (names to tensors)")
    return state


def fill(module: nn.Module, state: dict[str, Tensor], origin: str, what: str, wanted: Iterable[str] = ()) -> None:
    """Load ``state`` into ``module``: the names ``wanted``, by default all that the module has.

    Raises InputError that begins with ``origin`` and says how the file differs from ``what``.
    """
    own = module.state_dict()
    names = set(wanted) or set(own)
    # Counters of batch norms came late to torch: old files lack them and nothing depends on them.
    missing = sorted(name for name in names - state.keys() if not name.endswith("num_batches_tracked"))
    if missing:
        raise InputError(f"{origin}: no weights of {what}; {len(missing)} of {len(names)} missing, first {missing[0]}")
    for name in sorted(names & state.keys()):
        if state[name].shape != own[name].shape:
            raise InputError(
                f"{origin}: does not fit {what}; {name} has shape {list(state[name].shape)}, "
                f"not {list(own[name].shape)}"
            )
    try:
        module.load_state_dict({name: state[name] for name in names & state.keys()}, strict=False)
    except RuntimeError as error:
        raise InputError(f"{origin}: does not fit {what}: {str(error).splitlines()[0]}") from error
