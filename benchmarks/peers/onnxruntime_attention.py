"""In ONNX Runtime's environment: GroupQueryAttention of one decoded token, its new key and value appended."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper
from worker import serve, setting, time_steps, versions_of

KV_HEADS, GROUP, HEAD_DIM = 8, 4, 128
ROTATE_BYTES = 256 << 20  # of buffers are gone through before any is used again, so that caches are of no help
#: Bits: the type of the cache, its numpy type, elements in one.
CACHES = {
    32: (TensorProto.FLOAT, np.float32, 1),
    16: (TensorProto.FLOAT16, np.float16, 1),
    8: (TensorProto.INT8, np.int8, 1),
    4: (TensorProto.UINT8, np.uint8, 2),
}


def model(bits: int) -> bytes:
    """A model of one operator."""
    cache, _, packed = CACHES[bits]
    element = TensorProto.FLOAT16 if bits == 16 else TensorProto.FLOAT
    attributes: dict[str, Any] = {"num_heads": KV_HEADS * GROUP, "kv_num_heads": KV_HEADS}
    inputs = ["query", "key", "value", "past_key", "past_value", "seqlens_k", "total_sequence_length"]
    width, stored = HEAD_DIM * KV_HEADS, ["batch", KV_HEADS, "room", HEAD_DIM // packed]
    values = [
        helper.make_tensor_value_info("query", element, ["batch", 1, width * GROUP]),
        *(helper.make_tensor_value_info(name, element, ["batch", 1, width]) for name in ("key", "value")),
        *(helper.make_tensor_value_info(name, cache, stored) for name in ("past_key", "past_value")),
        helper.make_tensor_value_info("seqlens_k", TensorProto.INT32, ["batch"]),
        helper.make_tensor_value_info("total_sequence_length", TensorProto.INT32, [1]),
    ]
    if bits < 16:
        attributes |= {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": bits}
        inputs += [""] * 5 + ["k_scale", "v_scale"]
        shape = [KV_HEADS * HEAD_DIM]
        values += [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("k_scale", "v_scale")]
    outputs = [helper.make_tensor_value_info("output", element, ["batch", 1, width * GROUP])]
    outputs += [helper.make_tensor_value_info(name, cache, stored) for name in ("present_key", "present_value")]
    names = [value.name for value in outputs]
    node = helper.make_node("GroupQueryAttention", inputs, names, domain="com.microsoft", **attributes)
    graph = helper.make_graph([node], "attention", values, outputs)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()


class Attention:
    """One layer's attention over a cache of so many bits."""

    def __init__(self, bits: int, threads: int) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # others take their turns
        self.bits = bits
        self.session = ort.InferenceSession(model(bits), options, providers=["CPUExecutionProvider"])
        self.bindings: list[Any] = []
        self.turn = 0

    def about(self) -> dict[str, Any]:
        return {"versions": versions_of("onnxruntime")}

    def fill(self, context: int, batch: int) -> dict[str, Any]:
        """Buffers of random numbers with room for one more token, written where they are."""
        self.bindings = []
        _, kind, packed = CACHES[self.bits]
        shape = (batch, KV_HEADS, context, HEAD_DIM // packed)
        size = 2 * int(np.prod(shape)) * np.dtype(kind).itemsize
        random = np.random.default_rng(0)
        element = np.float16 if self.bits == 16 else np.float32
        width = KV_HEADS * HEAD_DIM
        numbers = random.standard_normal(shape, np.float32)
        numbers = (numbers * 20 if self.bits == 8 else numbers * 20 + 128 if self.bits == 4 else numbers).astype(kind)
        for _ in range(max(2, ROTATE_BYTES // size + 1)):
            given = {
                "query": random.standard_normal((batch, 1, width * GROUP)).astype(element),
                "key": random.standard_normal((batch, 1, width)).astype(element),
                "value": random.standard_normal((batch, 1, width)).astype(element),
                "seqlens_k": np.full(batch, context - 1, np.int32),
                "total_sequence_length": np.array([context], np.int32),
            }
            if self.bits < 16:
                given |= {name: np.full(width, 0.05, np.float32) for name in ("k_scale", "v_scale")}
            binding = self.session.io_binding()
            for name, array in given.items():
                binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array))
            for name in ("key", "value"):
                buffer = ort.OrtValue.ortvalue_from_numpy(numbers.copy())  # it shares the array
                binding.bind_ortvalue_input(f"past_{name}", buffer)
                binding.bind_ortvalue_output(f"present_{name}", buffer)
            binding.bind_output("output")
            self.bindings.append(binding)
        return {"bytes": size, "buffers": len(self.bindings)}

    def step(self) -> None:
        self.session.run_with_iobinding(self.bindings[self.turn % len(self.bindings)])
        self.turn += 1

    def decode(self, seconds: float, most: int) -> dict[str, Any]:
        return time_steps(self.step, seconds, most)

    def free(self) -> dict[str, Any]:
        self.bindings = []
        return {}


if __name__ == "__main__":
    attention = Attention(**setting())
    serve({"about": attention.about, "fill": attention.fill, "decode": attention.decode, "free": attention.free})
