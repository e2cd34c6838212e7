"""In llama.cpp's environment: one decoding step over caches of a kind, through its C interface.

A prompt is read once per kind of cache, and kept in files, longer ones made by repeating it: reading is not what is
measured here. Every sequence of a batch has its own copy.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import llama_cpp as llama
import numpy as np
from worker import folder, serve, setting, time_steps, versions_of

BLOCK, ROOM = 512, 256  # tokens of the prompt; room for decoded ones
KINDS = {"f16": llama.GGML_TYPE_F16, "q8_0": llama.GGML_TYPE_Q8_0, "q4_0": llama.GGML_TYPE_Q4_0}


class LlamaCpp:
    """A model in a GGUF file and a cache of one kind.

    Args:
        gguf: the file, with weights of 4 bits.
        threads: how many.
        keys, values: of `KINDS`.
        weights: "Q4_1" as the file has them, or "BF16": the same numbers in as many bits as the others read.
    """

    def __init__(self, gguf: str, threads: int, keys: str, values: str, weights: str) -> None:
        llama.llama_backend_init()
        self.threads, self.kind, self.weights = threads, (keys, values), weights
        path = Path(gguf) if weights == "Q4_1" else self._unpacked(Path(gguf))
        self.model = llama.llama_model_load_from_file(str(path).encode(), llama.llama_model_default_params())
        self.context: Any = None
        self.batch: Any = None
        self.position = 0

    def _unpacked(self, gguf: Path) -> Path:
        path = folder("llama_cpp") / "bf16.gguf"
        if not path.exists():
            parameters = llama.llama_model_quantize_default_params()
            parameters.ftype, parameters.allow_requantize = llama.LLAMA_FTYPE_MOSTLY_BF16, True
            parameters.nthread = self.threads
            new = path.with_suffix(".new")
            if llama.llama_model_quantize(str(gguf).encode(), str(new).encode(), ctypes.byref(parameters)):
                raise RuntimeError("llama_model_quantize failed")
            new.rename(path)
        return path

    def about(self) -> dict[str, Any]:
        system = llama.llama_print_system_info().decode()
        return {"versions": versions_of("llama-cpp-python"), "weights": self.weights, "system": system}

    def _open(self, tokens: int, sequences: int, together: bool = False) -> None:
        self.free()
        parameters = llama.llama_context_default_params()
        parameters.n_ctx, parameters.n_seq_max = (tokens + ROOM) * sequences, sequences
        parameters.n_batch = parameters.n_ubatch = BLOCK
        parameters.n_threads = parameters.n_threads_batch = self.threads
        parameters.flash_attn_type, parameters.kv_unified = llama.LLAMA_FLASH_ATTN_TYPE_ENABLED, together
        parameters.type_k, parameters.type_v = (KINDS[kind] for kind in self.kind)
        self.context = llama.llama_init_from_model(self.model, parameters)
        if not self.context:
            raise RuntimeError(f"llama.cpp refuses keys and values in {self.kind}")

    def _file(self, tokens: int) -> Path:
        """A file with a sequence of so many tokens, made if there is none."""
        path = folder("llama_cpp") / f"{self.kind[0]}-{self.kind[1]}-{tokens}.seq"
        if path.exists():
            return path
        if tokens == BLOCK:
            self._open(BLOCK, 1)
            ids = (llama.llama_token * BLOCK)(*np.random.default_rng(0).integers(1000, 40000, BLOCK).tolist())
            if llama.llama_decode(self.context, llama.llama_batch_get_one(ids, BLOCK)):
                raise RuntimeError("llama_decode failed")
        else:
            self._repeat(self._file(BLOCK), tokens // BLOCK)
        new = path.with_suffix(".new")
        if not llama.llama_state_seq_save_file(self.context, str(new).encode(), 0, (llama.llama_token * 1)(), 0):
            raise RuntimeError("llama_state_seq_save_file failed")
        new.rename(path)
        return path

    def _repeat(self, path: Path, times: int) -> None:
        """The first sequence becomes a file's so many times, one after the other: what is in it costs the same."""
        self._open(BLOCK, times, together=True)
        memory = llama.llama_get_memory(self.context)
        for sequence in range(times):
            self._load(path, sequence)
            if sequence:
                llama.llama_memory_seq_add(memory, sequence, 0, -1, BLOCK * sequence)
                llama.llama_memory_seq_cp(memory, sequence, 0, 0, -1)

    def _load(self, path: Path, sequence: int) -> None:
        tokens, count = (llama.llama_token * 1)(), ctypes.c_size_t(0)
        where = str(path).encode()
        if not llama.llama_state_seq_load_file(self.context, where, sequence, tokens, 1, ctypes.byref(count)):
            raise RuntimeError("llama_state_seq_load_file failed")

    def fill(self, context: int, batch: int) -> dict[str, Any]:
        path = self._file(context)
        self._open(context, batch)
        if batch == 1:
            self._load(path, 0)
        else:
            many = for_many(path, batch)
            for sequence in range(batch):
                self._load(many, sequence)
            many.unlink()
        self.position = context
        self.batch = llama.llama_batch_init(batch, 0, 1)
        self.batch.n_tokens = batch
        for sequence in range(batch):
            self.batch.token[sequence], self.batch.n_seq_id[sequence] = 5000, 1
            self.batch.seq_id[sequence][0], self.batch.logits[sequence] = sequence, 1
        return {"bytes": path.stat().st_size * batch}  # but for a header and positions, keys and values

    def step(self) -> None:
        for sequence in range(self.batch.n_tokens):
            self.batch.pos[sequence] = self.position
        if llama.llama_decode(self.context, self.batch):
            raise RuntimeError("llama_decode failed")
        llama.llama_synchronize(self.context)
        self.position += 1

    def decode(self, seconds: float, most: int) -> dict[str, Any]:
        return time_steps(self.step, seconds, most)

    def free(self) -> dict[str, Any]:
        if self.context:
            llama.llama_free(self.context)
            self.context = None
        return {}


def for_many(path: Path, sequences: int) -> Path:
    """The same sequence for a cache with a part for each of several: the file says how many parts there are, and for
    each how many tokens it holds; all are in the first."""
    data, new = bytearray(path.read_bytes()), path.with_suffix(".many")
    at = 12  # behind magic, version, and no tokens
    if int.from_bytes(data[at : at + 4], "little") != 1:
        raise RuntimeError("llama.cpp has changed its files of sequences")
    data[at : at + 4] = sequences.to_bytes(4, "little")
    new.write_bytes(data + bytes(4 * (sequences - 1)))
    return new


if __name__ == "__main__":
    engine = LlamaCpp(**setting())
    serve({"about": engine.about, "fill": engine.fill, "decode": engine.decode, "free": engine.free})
