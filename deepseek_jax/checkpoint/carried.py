"""Files beside the weights, which a conversion carries along in each direction.

All that is neither weights, index nor config goes with them: tokenizer files of any kind, code that
`auto_map` names, chat templates, licence, model card. A workdir keeps what generation reads in its
own folder, and the rest in `published/`, with the config.json that the weights came with: that file
also marks a run that began from weights, in all its later checkpoints.
"""

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from deepseek_jax.checkpoint.hf.safetensors import read_json
from deepseek_jax.config import ConfigError, DataConfig
from deepseek_jax.data import source as data_source

KEPT = "published"  # a workdir's folder of files that it does not use itself
SCALES = "scales.safetensors"  # there: scales of FP8 blocks, by which an export finds their bits
OTHERS = "others.safetensors"  # there: tensors of parts beside the text model, as they are
USED = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json",
    "chat_template.jinja",
)  # fmt: skip
_TOKENIZER = USED[:3]
LARGEST = 100_000_000  # bytes of a file that is carried along
_TEMPLATES = "additional_chat_templates"  # the one folder of a published directory that readers use
_WEIGHTS = (
    ".safetensors", ".index.json", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack",
    ".onnx", ".pkl", ".npz",
)  # fmt: skip
MADE_ANEW = ("bpe", "byte")  # values of data.tokenizer that name no tokenizer of a checkpoint
_FOREIGN = ("tiktoken.model", "tokenizer.model", "vocab.json", "spiece.model")


def files(source: Path, is_run: bool) -> dict[str, Path]:
    """Files to carry along from a Hugging Face directory or a workdir, by their path below it.

    Hidden files and links that lead out of the folder are left out, but for what generation reads
    and for the links of the hub's cache; a warning names a file that is too large or such a link.
    """
    found = dict(_of_folder(source / KEPT if is_run else source))
    if is_run:
        own = [name for name in USED if (source / name).is_file()]
        if "tokenizer.json" in found:  # as published: the run's copy has what it changed for itself
            own = [name for name in own if name not in _TOKENIZER]
        found |= {name: source / name for name in own}
    return found


def _of_folder(folder: Path) -> Iterator[tuple[str, Path]]:
    within = _roots(folder)
    for path in (*_sorted(folder), *_sorted(folder / _TEMPLATES)):
        name = path.relative_to(folder).as_posix()
        if path.name[0] == "." or name == "config.json" or name.lower().endswith(_WEIGHTS):
            continue
        if not path.is_file():
            continue
        real = Path(os.path.realpath(path))
        outside = not any(real.is_relative_to(root) for root in within)
        if outside and name in USED and name.endswith(".json"):
            read_json(path)  # refuses what only bears the name
        elif outside:
            warnings.warn(f"{path} is a link out of its folder; it is left out", stacklevel=2)
            continue
        if not os.access(path, os.R_OK):
            raise ConfigError(f"{path} cannot be read: Permission denied")
        if path.stat().st_size > LARGEST:
            warnings.warn(f"{path} is larger than {LARGEST:,} bytes; it is left out", stacklevel=2)
        else:
            yield name, path


def _sorted(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _roots(folder: Path) -> list[Path]:
    """Folders that links may lead to: this one, and the blobs of the hub's cache."""
    real = Path(os.path.realpath(folder))
    return [real, real.parents[1] / "blobs"] if real.parent.name == "snapshots" else [real]


def size(carried: Mapping[str, Path]) -> int:
    """Bytes of files to carry along."""
    return sum(path.stat().st_size for path in carried.values())


def copy(carried: Mapping[str, Path], folders: Sequence[Path], read: Mapping[str, bytes]) -> None:
    """Copies files into new folders; `read` holds contents that were read before."""
    for name, path in carried.items():
        content = read.get(name)
        content = path.read_bytes() if content is None else content
        for folder in folders:
            to = folder / name
            to.parent.mkdir(parents=True, exist_ok=True)
            to.write_bytes(content)


def settings(workdir: Path) -> dict[str, Any] | None:
    """The config.json that a run's weights came with; None for a run that began without weights."""
    file = workdir / KEPT / "config.json"
    return read_json(file) if file.is_file() else None


def without_absent_code(settings: Mapping[str, Any], carried: Mapping[str, Path]) -> dict[str, Any]:
    """Settings whose `auto_map` names no Python file that is missing beside them.

    An entry is "module.Class", or "repository--module.Class", which needs no file.
    """
    out = dict(settings)
    named = out.get("auto_map")
    if not isinstance(named, dict):
        return out
    kept = {
        key: value
        for key, value in named.items()
        if all(
            "--" in entry or f"{entry.rpartition('.')[0]}.py" in carried
            for entry in (value if isinstance(value, list) else [value])
            if isinstance(entry, str)
        )
    }
    del out["auto_map"]
    return {**out, "auto_map": kept} if kept else out


def check_tokenizer(workdir: Path, data: DataConfig) -> None:
    """Refuses to make a tokenizer for a run that began from weights, which know other ids.

    Raises:
      ConfigError: `data.tokenizer` is one that is made anew, and the data is text.
    """
    if data.tokenizer not in MADE_ANEW or not began_from_weights(workdir):
        return
    if data.path and data_source.token_files(data.path):
        return
    folders = (workdir, workdir / KEPT)
    own = next((f / name for name in _FOREIGN for f in folders if (f / name).is_file()), None)
    why = f"; its own is in {own}, which is not read" if own else ""
    if (workdir / "tokenizer.json").is_file():
        cure = f"set data.tokenizer={workdir.absolute() / 'tokenizer.json'}"
    else:
        cure = "set data.tokenizer to a tokenizer.json with the ids of the weights"
    raise ConfigError(
        f"--workdir={workdir} began from the weights of another checkpoint, and data.tokenizer="
        f"{data.tokenizer!r} would make a tokenizer with other ids than these know{why}; {cure}, "
        "or data.path to token files (.npy, .bin) with such ids"
    )


def began_from_weights(workdir: Path) -> bool:
    """Whether `convert` made the workdir; an older one is known by step 0, which no run saves."""
    return (workdir / KEPT / "config.json").is_file() or (workdir / "checkpoints" / "0").is_dir()
