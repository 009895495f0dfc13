"""Reading a Hugging Face folder's weights, one tensor in memory at a time.

    FolderWeights   name -> tensor, over safetensors or legacy .bin files, one or many
    live_view       a reader of source-shaped tensors -> a reader of an architecture's live tensors
    source_view     the inverse: live tensors -> tensors in the source's shape, zero where units are gone

Opening a folder reads names, shapes and dtypes of all its files and none of the numbers; so a shard that is missing or
cut off is found at once. Legacy files are pickles, of which nothing but tensors is accepted (`weights_only`).
"""

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_prune.checkpoint.guarded_reader import is_whole, load_plain
from megatron_prune.data.hub_files import LFS_HINT, is_lfs_pointer, present, read_json, what_else
from megatron_prune.errors import UserError
from megatron_prune.huggingface.config import read_shape
from megatron_prune.model.architecture import Architecture
from megatron_prune.model.families import table_of
from megatron_prune.model.llama import take
from megatron_prune.model.shape import LlamaShape
from megatron_prune.model.sources import finite
from megatron_prune.model.table import EMBEDDING, HF_LM_HEAD, expand

logger = logging.getLogger(__name__)

Reader = Callable[[str], Tensor]
FLOATS = {torch.float32, torch.float16, torch.bfloat16}
_SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_SINGLE = ("model.safetensors", "pytorch_model.bin")
_LISTED = 10


@dataclass(frozen=True)
class Stored:
    """Where a tensor is and what it is, known without reading it; `dtype` is torch's, or the file's own word for it.

    `fused`: the tensor that it is a part of, and its first row there.
    """

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype | str
    fused: tuple[str, int] | None = None

    @property
    def is_float(self) -> bool:
        """True for the dtypes that weights may have (and that can be trained)."""
        return self.dtype in FLOATS


class FolderWeights:
    """Callable `hf_name -> Tensor` (CPU, in the stored dtype) over the weight files of `folder`.

    Looked for, in this order: `model.safetensors`, `model.safetensors.index.json`, `pytorch_model.bin`,
    `pytorch_model.bin.index.json`.

    Attributes:
        stored: every tensor of the folder by its name.

    Raises:
        UserError: no weights, a file is missing, cut off or of another format, or index and files disagree.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._unmapped: tuple[Path, dict[str, Tensor]] | None = None
        files, listed = _weight_files(self.folder)
        self.stored: dict[str, Stored] = {}
        for file in files:
            for name, stored in self._contents(file).items():
                if name in self.stored:
                    raise UserError(f"{file}: {name} is also in {self.stored[name].file.name}")
                self.stored[name] = stored
        for name, file in listed.items():
            if name == HF_LM_HEAD and name not in self.stored:
                continue  # tied models may list one that nobody stores; `check` misses it where it is needed
            if name not in self.stored or self.stored[name].file != file:
                raise UserError(f"{file}: {name} is not in it, though the index says so; download the folder again")
        self.stored = split_fused(self.stored, self.folder)

    def __call__(self, hf_name: str) -> Tensor:
        """The tensor of that name, perhaps mapped from its file: not to be written to. Raises UserError: it cannot be
        read, or holds values that are not finite."""
        return finite(self._read(hf_name), f"{self.stored[hf_name].file}: {hf_name}")

    def check_finite(self) -> None:
        """Read every weight that is a float, one in memory at a time. Raises UserError as a call does."""
        for name, stored in self.stored.items():
            if stored.dtype in FLOATS:
                self(name)

    def _read(self, hf_name: str) -> Tensor:
        stored = self.stored[hf_name]
        if stored.fused is not None:
            name, start = stored.fused
            return self._tensor(stored, name)[start : start + stored.shape[0]]
        return self._tensor(stored, hf_name)

    def _tensor(self, stored: Stored, hf_name: str) -> Tensor:
        if stored.file.suffix != ".safetensors":
            return self._legacy(stored.file)[hf_name].detach()
        from safetensors import SafetensorError, safe_open

        try:
            # Opened anew each time: an open file keeps the pages mapped that were read from it.
            with safe_open(str(stored.file), framework="pt") as tensors:
                return tensors.get_tensor(hf_name)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{stored.file}: cannot read {hf_name}: {error}") from error

    @property
    def total_bytes(self) -> int:
        """Size of all tensors."""
        return sum(_bytes(stored) for stored in self.stored.values())

    @property
    def largest_bytes(self) -> int:
        """Size of the largest tensor: what reading one by one has in memory."""
        return max(_bytes(stored) for stored in self.stored.values())

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that holds every weight exactly: the common one, or float32 where there are several."""
        found = {stored.dtype for stored in self.stored.values() if isinstance(stored.dtype, torch.dtype)} & FLOATS
        return found.pop() if len(found) == 1 else torch.float32

    @property
    def dtypes(self) -> tuple[torch.dtype, dict[str, torch.dtype]]:
        """The dtype that most of the data is in, and by name the weights (norms, as a rule) that are in another."""
        floats = {name: stored.dtype for name, stored in self.stored.items() if isinstance(stored.dtype, torch.dtype)}
        floats = {name: dtype for name, dtype in floats.items() if dtype in FLOATS}
        sizes: Counter[torch.dtype] = Counter()
        for name, dtype in floats.items():
            sizes[dtype] += math.prod(self.stored[name].shape)
        main = max(sizes, key=sizes.__getitem__, default=torch.float32)
        return main, {name: dtype for name, dtype in floats.items() if dtype != main}

    def check(self, model: LlamaShape | Architecture) -> None:
        """Account for every tensor: all that `model` needs are there, in its shape and a dtype of `FLOATS`; no other.

        Known leftovers pass: rotary frequencies of old exports, and a tied `lm_head.weight` equal to the embedding.
        Raises UserError: one line that lists what is missing, unused, mis-shaped or of another dtype."""
        architecture = model if isinstance(model, Architecture) else Architecture.full(model)
        shape = architecture.shape
        expected = architecture.table.hf_shapes(architecture)
        missing = sorted(set(expected) - set(self.stored))
        unused = sorted(name for name in set(self.stored) - set(expected) if not self._is_leftover(name, shape))
        wrong = [
            f"{name} {list(self.stored[name].shape)} instead of {list(size)}"
            for name, size in expected.items()
            if name in self.stored and self.stored[name].shape != size
        ]
        not_float = [
            f"{name} {str(self.stored[name].dtype).removeprefix('torch.')}"
            for name in expected
            if name in self.stored and not self.stored[name].is_float
        ]
        complaints = [
            f"{kind}: {_listing(names)}"
            for kind, names in (
                ("missing", missing),
                ("unused", unused),
                ("wrong shape", wrong),
                ("dtype not supported", not_float),
            )
            if names
        ]
        if HF_LM_HEAD in missing:
            complaints.append("(tie_word_embeddings is false in config.json, so an output layer of its own is needed)")
        if complaints:
            raise UserError(f"{self.folder}: weights do not fit config.json: {'; '.join(complaints)}")

    def _is_leftover(self, name: str, shape: LlamaShape) -> bool:
        if name.endswith("rotary_emb.inv_freq"):
            return True
        embedding = table_of(shape).find(EMBEDDING).parts[0].hf_name
        if name != HF_LM_HEAD or not shape.tie_word_embeddings or embedding not in self.stored:
            return False
        if self.stored[name].shape != self.stored[embedding].shape or not torch.equal(self(name), self(embedding)):
            raise UserError(
                f"{self.folder}: {HF_LM_HEAD} differs from {embedding}, though config.json has tie_word_embeddings "
                "true; set it to false if the model has an output layer of its own, or remove the tensor"
            )
        return True

    def _contents(self, file: Path) -> dict[str, Stored]:
        if file.suffix == ".safetensors":
            return _safetensors_contents(file)
        tensors = self._legacy(file)
        return {name: Stored(file, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}

    def _legacy(self, file: Path) -> dict[str, Tensor]:
        """The tensors of a .bin file, mapped from it anew; only a file that cannot be mapped is kept, the last one."""
        if self._unmapped is not None and self._unmapped[0] == file:
            return self._unmapped[1]
        self._unmapped = None
        tensors, is_mapped = _load_legacy(file)
        if not is_mapped:
            self._unmapped = (file, tensors)
        return tensors


def split_fused(stored: dict[str, Stored], folder: Path) -> dict[str, Stored]:
    """The same with Phi-3's fused tensors as their parts: `qkv_proj` is queries, keys, values, `gate_up_proj` halves.
    Raises UserError: there are such tensors, and `config.json` does not fit them."""
    if not any(name.endswith(("qkv_proj.weight", "gate_up_proj.weight")) for name in stored):
        return stored
    shape = read_shape(folder)
    query, kv = (count * shape.kv_channels for count in (shape.num_attention_heads, shape.num_query_groups))
    fused = {
        "qkv_proj.weight": {"q_proj.weight": query, "k_proj.weight": kv, "v_proj.weight": kv},
        "gate_up_proj.weight": dict.fromkeys(("gate_proj.weight", "up_proj.weight"), shape.ffn_hidden_size),
    }
    found = {}
    for name, whole in stored.items():
        last = ".".join(name.split(".")[-2:])
        if last not in fused:
            found[name] = whole
            continue
        if whole.shape[0] != sum(fused[last].values()):
            raise UserError(f"{whole.file}: {name} has {whole.shape[0]} rows, config.json {sum(fused[last].values())}")
        start = 0
        for part, rows in fused[last].items():
            place = name.removesuffix(last)
            found[f"{place}{part}"] = Stored(whole.file, (rows, *whole.shape[1:]), whole.dtype, (name, start))
            start += rows
    return found


def _weight_files(folder: Path) -> tuple[list[Path], dict[str, Path]]:
    """(files that hold weights, what an index says is where)."""
    if not folder.is_dir():
        hint = what_else(folder) or "; name the folder of a Hugging Face model"
        raise UserError(f"{folder}: is no folder{hint}")
    for single in _SINGLE:
        if present(folder / single):
            return [folder / single], {}
        index = folder / f"{single}.index.json"
        if present(index):
            return _indexed_files(folder, index)
    looked_for = f"looked for {' and '.join(_SINGLE)} and their .index.json"
    raise UserError(f"{folder}: holds no weights; {looked_for}{what_else(folder)}")


def _indexed_files(folder: Path, index: Path) -> tuple[list[Path], dict[str, Path]]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index}: has no weight_map")
    for file in weight_map.values():
        if not isinstance(file, str) or Path(file).name != file or not file.isprintable() or len(file) > 200:
            raise UserError(f"{index}: {repr(file)[:60]} is no name of a file in this folder")
    files = sorted({folder / file for file in weight_map.values()})
    absent = [file.name for file in files if not file.is_file()]
    if absent:
        raise UserError(f"{folder}: files named in {index.name} are missing: {_listing(absent)}")
    return files, {name: folder / file for name, file in weight_map.items()}


def _safetensors_contents(file: Path) -> dict[str, Stored]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(file), framework="pt") as tensors:
            found = {}
            for name in tensors.keys():  # noqa: SIM118 (the file is no dict)
                piece = tensors.get_slice(name)
                dtype = piece.get_dtype()
                found[name] = Stored(file, tuple(piece.get_shape()), _SAFETENSORS_DTYPES.get(dtype, dtype))
            return found
    except (SafetensorError, OSError) as error:
        if is_lfs_pointer(file):
            raise UserError(f"{file}: {LFS_HINT}") from error
        raise UserError(f"{file}: is cut off, damaged or no safetensors file: {error}") from error


def _load_legacy(file: Path) -> tuple[dict[str, Tensor], bool]:
    """(all tensors of the file, whether they are mapped from it rather than read into memory)."""
    is_mapped = True
    if is_lfs_pointer(file):
        raise UserError(f"{file}: {LFS_HINT}")
    try:
        content = load_plain(file, mmap=True)
    except UserError as error:
        if "mmap" not in str(error):
            raise
        logger.info("%s: written by a torch before 1.6, cannot be mapped and is read as a whole", file.name)
        content, is_mapped = load_plain(file), False
    if not isinstance(content, dict) or not all(isinstance(tensor, Tensor) for tensor in content.values()):
        raise UserError(f"{file}: is no table of tensors; only plain weights (a state dict) are read")
    if wrong := next((name for name, tensor in content.items() if not is_whole(tensor)), None):
        raise UserError(f"{file}: {wrong!a} is no plain tensor, or has fewer values than its shape")
    return content, is_mapped


def _bytes(stored: Stored) -> int:
    size = stored.dtype.itemsize if isinstance(stored.dtype, torch.dtype) else 1
    for length in stored.shape:
        size *= length
    return size


def _listing(names: Iterable[str]) -> str:
    """The first few names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def live_view(read: Reader, architecture: Architecture) -> Reader:
    """Reader of the live tensors of `architecture`, from one of tensors in the source's shape."""

    def read_live(hf_name: str) -> Tensor:
        part, layer = architecture.table.parts[hf_name]
        ids = [expand(architecture.ids(dim.kind, layer), dim.size) for dim in part.dims]
        return take(read(hf_name), ids)

    return read_live


def layers_left(read: Reader, architecture: Architecture) -> tuple[Reader, Architecture]:
    """`architecture` with its layers numbered anew (see `Architecture.renumbered`), and a reader of its live tensors by
    their new names from one by names in the source."""
    renumbered = architecture.renumbered()
    live = (row for row in architecture.table.rows if row.lives_in(architecture))
    names = {
        new.hf_name: old.hf_name
        for row, was in zip(renumbered.table.rows, live, strict=True)
        for new, old in zip(row.parts, was.parts, strict=True)
    }
    return (lambda hf_name: read(names[hf_name])), renumbered


def source_view(read: Reader, architecture: Architecture) -> Reader:
    """Reader of tensors in the source's shape, zero where units are gone, from one of `architecture`'s live tensors.

    The inverse of `live_view` on what is live. One tensor in memory at a time, in both shapes.
    """
    full = Architecture.full(architecture.shape)
    if architecture == full:
        return read
    table = architecture.table
    shapes = table.hf_shapes(full)

    def read_source(hf_name: str) -> Tensor:
        part, layer = table.parts[hf_name]
        live = read(hf_name)
        ids = [torch.from_numpy(expand(architecture.ids(dim.kind, layer), dim.size)) for dim in part.dims]
        assert tuple(live.shape) == tuple(map(len, ids)), f"{hf_name}: {tuple(live.shape)}"
        result = live.new_zeros(shapes[hf_name])
        result[torch.meshgrid(*ids, indexing="ij")] = live
        return result

    return read_source
