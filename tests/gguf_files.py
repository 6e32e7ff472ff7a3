"""GGUF files as llama.cpp's converters write them, for the tests."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np


def write_gguf(path: Path, metadata: dict[str, Any], tensors: dict[str, np.ndarray], kinds: dict[str, Any]) -> Path:
    """A file with these metadata, and tensors quantised as `kinds` says by name; float32 where it says nothing.

    A row that does not divide into blocks is stored as float16 instead, as llama.cpp does.
    """
    writer = gguf.GGUFWriter(path, metadata["general.architecture"])
    adders = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for key, value in metadata.items():
        if key != "general.architecture":  # which the writer has written
            adders.get(type(value), writer.add_array)(key, value)
    for name, tensor in tensors.items():
        kind = kinds.get(name, gguf.GGMLQuantizationType.F32)
        if tensor.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
            kind = gguf.GGMLQuantizationType.F16
        writer.add_tensor(name, gguf.quantize(tensor.astype(np.float32), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
