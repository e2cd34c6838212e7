"""In OpenVINO's environment: a decoding step of the stateful model, or of the paged one as OpenVINO GenAI serves it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
from openvino._offline_transformations import paged_attention_transformation
from worker import folder, serve, setting, time_steps, versions_of

BLOCK, PROMPT, ROOM = 32, 512, 256  # tokens of a block, of the prompt, and room for decoded ones


class Stateful:
    """The model as optimum-intel exports it, its weights in 16 bits.

    Args:
        model: the folder to export it from.
        threads: how many.
        options: of OpenVINO's CPU plugin.
    """

    def __init__(self, model: str, threads: int, options: dict[str, str]) -> None:
        path = folder("openvino") / "openvino_model.xml"
        if not path.exists():
            export(model, path.parent)
        core = ov.Core()
        given = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads, **options}
        self.compiled = core.compile_model(self.changed(core.read_model(path)), "CPU", given)
        self.request = self.compiled.create_infer_request()
        self.inputs: dict[str, np.ndarray] = {}

    def changed(self, model: ov.Model) -> ov.Model:
        return model

    def about(self) -> dict[str, Any]:
        names = ("INFERENCE_PRECISION_HINT", "KV_CACHE_PRECISION", "KEY_CACHE_PRECISION", "VALUE_CACHE_PRECISION")
        found = {name: str(self.compiled.get_property(name)) for name in names}
        return {"versions": versions_of("openvino", "optimum-intel"), "properties": found}

    def fill(self, context: int, batch: int) -> dict[str, Any]:
        """Every variable gets the same random numbers, [batch, heads, tokens, head_dim]."""
        self.request.reset_state()
        random = np.random.default_rng(0)
        states = self.request.query_state()
        numbers = None
        for state in states:
            shape = (batch, state.state.shape[1], context, state.state.shape[3])
            if numbers is None or numbers.shape != shape:
                numbers = random.standard_normal(shape, np.float32)
            element = state.state.element_type
            tensor = ov.Tensor(element, shape)
            tensor.data[:] = numbers.astype(tensor.data.dtype)
            state.state = tensor
        self.inputs = {
            "input_ids": np.full((batch, 1), 5000, np.int64),
            "beam_idx": np.arange(batch, dtype=np.int32),
            "position_ids": np.full((batch, 1), context, np.int64),
            "attention_mask": np.ones((batch, context + 1), np.int64),
        }
        self.step()
        return {"states": len(states), "element": str(states[0].state.element_type)}

    def step(self) -> None:
        self.request.infer(self.inputs, share_inputs=True)
        self.inputs["position_ids"] += 1
        mask = self.inputs["attention_mask"]
        self.inputs["attention_mask"] = np.ones((mask.shape[0], mask.shape[1] + 1), np.int64)

    def decode(self, seconds: float, most: int) -> dict[str, Any]:
        return time_steps(self.step, seconds, most)

    def free(self) -> dict[str, Any]:
        self.request.reset_state()
        self.request = self.compiled.create_infer_request()
        return {}


class Paged(Stateful):
    """The same with OpenVINO's paged attention, its cache in blocks."""

    def changed(self, model: ov.Model) -> ov.Model:
        paged_attention_transformation(model)
        return model

    def fill(self, context: int, batch: int) -> dict[str, Any]:
        """A prompt's blocks repeated, so that every sequence has blocks of its own: what is in them costs the same."""
        each = (context + ROOM) // BLOCK
        caches = {
            port.any_name: ov.Tensor(
                port.element_type, [each * batch, *(n.get_length() for n in port.partial_shape[1:])]
            )
            for port in self.compiled.inputs
            if "cache." in port.any_name
        }
        for name, tensor in caches.items():
            self.request.set_tensor(name, tensor)
        ids = np.random.default_rng(0).integers(1000, 40000, PROMPT)
        self._infer(ids, np.arange(PROMPT), [0], [0, PROMPT], np.arange(PROMPT // BLOCK), [0, PROMPT // BLOCK])
        for tensor in caches.values():
            blocks = tensor.data.view(np.uint8).reshape(each * batch, -1)
            for at in range(PROMPT // BLOCK, len(blocks), PROMPT // BLOCK):
                some = blocks[at : at + PROMPT // BLOCK]
                some[:] = blocks[: len(some)]
        self.batch, self.each, self.position = batch, each, context
        self.step()
        return {"bytes": sum(tensor.byte_size for tensor in caches.values()) * context // (each * BLOCK)}

    def step(self) -> None:
        batch, used = self.batch, self.position // BLOCK + 1
        blocks = np.concatenate([np.arange(used) + i * self.each for i in range(batch)])
        begins = np.arange(batch + 1)
        past = [self.position] * batch
        self._infer(np.full(batch, 5000), np.array(past), past, begins, blocks, begins * used)
        self.position += 1

    def _infer(self, ids: Any, positions: Any, past: Any, begins: Any, blocks: Any, block_begins: Any) -> None:
        whole = {"input_ids": ids, "position_ids": positions}
        small = {"past_lens": past, "subsequence_begins": begins}
        small |= {"block_indices": blocks, "block_indices_begins": block_begins}
        small |= {"max_context_len": positions[-1] + 1}
        given = {name: np.asarray(value, np.int64) for name, value in whole.items()}
        given |= {name: np.asarray(value, np.int32) for name, value in small.items()}
        self.request.infer(given, share_inputs=True)

    def free(self) -> dict[str, Any]:
        self.request = self.compiled.create_infer_request()
        return {}


def export(model: str, to: Path) -> None:
    """Converts the model, once."""
    from optimum.intel import OVModelForCausalLM

    OVModelForCausalLM.from_pretrained(model, export=True, compile=False, load_in_8bit=False).save_pretrained(to)


if __name__ == "__main__":
    given = setting()
    engine = (Paged if given.pop("paged", False) else Stateful)(**given)
    serve({"about": engine.about, "fill": engine.fill, "decode": engine.decode, "free": engine.free})
